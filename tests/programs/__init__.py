"""Programs that tests start as processes of their own, many of them on several ranks."""
