"""The HTTP service: settings -> catalog of loaded models -> body -> prepared request -> run queue -> answer.

settings.py       what can be set, by command line or environment
loading.py        an artifact on disk -> a model that has proved itself
catalog.py        which models there are, which one answers, what is ready
batching.py       when a request runs; knows neither FastAPI nor onnxruntime
prediction.py     a request and an answer, whatever the wire format
predict_json.py   their JSON form
predict_npy.py    their .npy form
exchange.py       what every wire format shares: the body's limit, negotiation, clients that leave
statuses.py       errors as HTTP statuses, in one table
openapi.py        bodies and answers, described
app.py            the routes
server.py         the socket, the signals, the process
"""
