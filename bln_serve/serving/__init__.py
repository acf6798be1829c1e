"""The HTTP service: settings -> catalog of loaded models -> message -> prepared request -> run queue -> answer.

settings.py           what can be set, by command line or environment

loading.py            an artifact on disk -> a model that has proved itself
cost.py               what its runs cost, and so how many rows one should have
catalog.py            which models there are, which one answers, what is ready

batching.py           when requests run and which share a run; knows neither arrays, nor FastAPI, nor onnxruntime
merging.py            what may share a run, and how: the kinds of row coupling, applied

prediction.py         a request and an answer, whatever the wire protocol
predict.py            POST /predict, with predict_json.py and predict_npy.py
tf_serving.py         TensorFlow Serving's REST v1
open_inference.py     the Open Inference Protocol v2, with binary_tensors.py

exchange.py           what every protocol shares: limits of size and time, clients that leave
routes.py             which URL asks what, in which protocol
answering.py          read, check, queue, run, write: the hot path, in front of FastAPI

statuses.py           errors as HTTP statuses, in one table
metrics.py            what Prometheus is told
openapi.py            bodies and answers, described
protocol_routes.py    health and metadata, as the protocols want them
app.py                the application
server.py             the socket, the signals, the process
"""
