"""Many adapters on one base, served: the store of adapters, the engine, and the HTTP server."""
