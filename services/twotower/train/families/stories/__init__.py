"""Word problems with events day by day and numbers up to 20, on which the shipped checkpoint was trained."""
