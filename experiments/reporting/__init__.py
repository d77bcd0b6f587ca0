"""From the folders of runs to tables and figures."""
