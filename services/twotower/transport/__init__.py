"""How states and deltas travel from a context to a denoiser: one interface, three transports.

`grpc` sends frames on the link's stream, `shm` maps the same memory in two processes of one machine, `dist` is
torch.distributed point to point. Control messages stay on gRPC with all of them.
"""
