def get_config():
    return get_config()
