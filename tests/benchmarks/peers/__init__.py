"""The service beside other servers: the same model, the same load, and whose answers move under others' traffic."""
