"""The server's side of federated learning."""
