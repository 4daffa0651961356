"""The models that are served, and who runs them when: files, sessions, queue, deadline."""
