"""Pixels in and out: video files and contact sheets. Import the file you need; nothing is re-exported here."""
