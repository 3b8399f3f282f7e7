"""Workers that several rooms host: ordinary classes, one instance a rank."""
