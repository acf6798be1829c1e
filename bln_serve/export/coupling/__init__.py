"""How an ONNX graph couples rows, proved on the graph itself: nothing is executed.

    analyse(model) -> GraphCoupling
    tensors_of(model) -> the graph, and what is known of each of its tensors

Each tensor has a state: on which axis its rows lie, how many entries of that axis a row makes, and what its values
depend on beside their own row. Each operator has a rule from the states of its inputs to those of its outputs. What no
rule covers is not independent.

    sizes          lengths of axes, with the number of rows as a symbol
    states         what is known of a tensor
    calls          what a rule sees and answers
    constants, values, inference    what the graph holds, computes of sizes, and ONNX infers
    elementwise, reductions, shaping, slicing, indexing, products, networks, quantization, sequences, custom
                   the rules, by family
    operators      which operator has which rule
    subgraphs      Loop, Scan, If
    functions      model-local functions
    causes         which node couples first, in words
    walk           from inputs to outputs
    analysis       the verdict on a model
"""

from bln_serve.export.coupling.analysis import GraphCoupling, analyse, tensors_of
from bln_serve.export.coupling.states import Tensor
from bln_serve.export.coupling.walk import MALFORMED

__all__ = ["MALFORMED", "GraphCoupling", "Tensor", "analyse", "tensors_of"]
