"""Selecting a statistics policy on validation data.

record          what was evaluated, how it ranks, and what was chosen
ranking         the choice, from the losses alone
report, plot    selection.json and the table; selection.png
named_scores    Keras's losses and metrics by name
scoring         what is scored with: as compiled, or as named
side_by_side    one mini-batch under several candidates in one run
evaluation      their losses and metrics, confirmed by what the layers themselves compute
candidates      the policies and variants that compete; the search
"""
