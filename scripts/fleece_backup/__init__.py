"""Parts of fleece-backup."""
