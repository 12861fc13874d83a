"""What an app ships: package forms and their manifest (L8)."""
