"""What the services share through Redis: the queue of ready sessions, and who is alive. No model, no gRPC."""
