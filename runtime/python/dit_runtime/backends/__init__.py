"""One file a backend, imported only when it is asked for."""
