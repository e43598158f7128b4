"""What the services share through Redis: the queue of ready sessions, and the registry of replicas. No model, no gRPC."""
