"""Word problems of one to six steps, with numbers up to 100, and their worked solutions."""
