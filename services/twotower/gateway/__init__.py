"""The gateway: one core that checks, admits, routes and streams requests, and its two faces, gRPC and HTTP. No torch here."""
