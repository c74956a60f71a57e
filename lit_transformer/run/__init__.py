"""What belongs to a run: its folder, its configuration, its files, and what it tells the person who watches."""
