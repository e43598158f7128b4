"""What the services of a stack have in common: settings, and how the process of a tower starts and ends."""
