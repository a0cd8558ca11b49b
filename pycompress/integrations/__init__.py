"""Other libraries' loops; each imports its library when it is imported itself."""
