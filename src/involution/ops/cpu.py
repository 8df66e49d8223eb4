def available(): return False
def description(): return "reference"
