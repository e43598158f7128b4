"""Word problems that happen day by day, with numbers up to 20: what the shipped checkpoint was trained on."""
