"""Links between processes: gRPC streams under mutual TLS, connecting, and telling a dead peer."""
