"""The whole stack on one machine, as processes: started together, watched, drained in order. It serves nothing itself."""
