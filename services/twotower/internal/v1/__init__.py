"""Generated stubs of `proto/twotower/internal/v1`: the contract between the services of a stack. Not for clients."""
