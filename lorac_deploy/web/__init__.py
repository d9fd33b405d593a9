"""A static page that fine-tunes an artifact's model in a browser: `lorac-deploy web`."""
