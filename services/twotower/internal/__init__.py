"""What the services of a stack say to each other. It may change with every release."""
