"""An HTTP server for exported models in which each request names its own adapter. Needs the `serve` extra."""
