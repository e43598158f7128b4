"""How settings are declared, and where their values come from. The services declare the settings themselves."""
