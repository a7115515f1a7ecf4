"""`dit-serve`: bundles behind the HTTP API of OpenAI's image clients. The batcher is `dit_runtime.serve`."""
