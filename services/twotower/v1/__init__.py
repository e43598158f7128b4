"""Generated gRPC stubs of proto/twotower/v1; `make proto` writes them, nobody edits them."""
