"""In which regime does removing conflict, or balancing the losses, beat the plain sum?"""
