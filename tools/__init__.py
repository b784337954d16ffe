"""What is typed rarely, from the project's folder: python -m tools.NAME."""
