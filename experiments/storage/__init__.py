"""What runs keep on disk: files, folders of runs, their names, and trained weights."""
