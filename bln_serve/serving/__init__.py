"""The HTTP service: settings -> catalog of loaded models -> message -> prepared request -> run queue -> answer.

settings.py           what can be set, by command line or environment

loading.py            an artifact on disk -> a model that has proved itself
cost.py               what its runs cost, and so how many rows one should have
watching.py           what lies at the paths, looked at again and again
known_versions.py     what is known of it: which versions are there, broken, to be tried
background.py         threads for what may hang
memory.py             what was freed goes back to the system
readiness.py          how far the loading is, of the service and of each version
served_model.py       a version that is served, its users and its end
catalog.py            which version of each model answers, what is ready

batching.py           when requests run and which share a run; knows neither arrays, nor FastAPI, nor onnxruntime
queued.py             what stands in the run queue, and the report of a run
merging.py            what may share a run, and how: the kinds of row coupling, applied

prediction.py         a request and an answer, whatever the wire protocol
predict.py            POST /predict, with predict_json.py and predict_npy.py
tf_serving.py         TensorFlow Serving's REST v1
open_inference.py     the Open Inference Protocol v2, with binary_tensors.py

exchange.py           what every protocol shares: limits of size and time, clients that leave
routes.py             which URL asks what, in which protocol
answering.py          read, check, queue, run, write: the hot path, in front of FastAPI

gate.py               who may ask, with tokens.py; in front of everything else
request_ids.py        by what a request is known
logs.py               lines as text or JSON

statuses.py           errors as HTTP statuses, in one table
metrics.py            what Prometheus is told
protocol_routes.py    health and metadata, as the protocols want them
app.py                the application

pages.py              what people open in a browser, with its files in static/
examples.py           a request that a model answers, to begin with
openapi.py            the description, with openapi_operations.py and openapi_schemas.py

address.py            the socket that is listened on
connections.py        one client's connection: how long it may be silent, how much it may send
cycles.py             a request and its answer on it
refusals.py           what is said to what is no request
alarms.py             a connection's waits, nearly all of which end early
server.py             the process that answers: its signals and its exit code
workers.py            several of them: started, started again, ended together
lifeline.py           what ties each of these to the process that started it
"""
