"""The demo: raw annotations of real and drawn pictures in, a small CogVLM that answers out."""
