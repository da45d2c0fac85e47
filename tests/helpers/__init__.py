"""What test files share: tiny configs and networks, stand-ins, reference implementations, files in foreign formats."""
