"""Files of /v1/files: kept on the disk under quotas, listed in the database."""
