"""`baton bench serve`: an open-loop load generator for OpenAI-compatible servers and Baton's gRPC, with bench_serving's names.

    options -> datasets + arrivals -> load (http | grpc) -> answers -> metrics -> report, plot

What decides (arrivals, datasets, metrics, the readers of HTTP and of server-sent events) is pure. Nothing here knows the server's inside.
"""
