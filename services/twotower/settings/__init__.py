"""How settings are declared, and where their values come from. What settings there are, the services say themselves."""
