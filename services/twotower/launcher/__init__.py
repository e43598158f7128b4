"""The whole stack on one machine, as processes: started in parallel, watched, drained in order. It serves nothing itself."""
