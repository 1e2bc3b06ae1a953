"""What the scripts beside this folder time and print; they import it after their options are read."""
