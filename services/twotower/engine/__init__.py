"""Generation: sessions, block refinement, AR decoding. Knows the towers; knows no gRPC, Redis or process."""
