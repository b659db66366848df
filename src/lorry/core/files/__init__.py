"""Reading and writing adapters: Lorry's folders, PEFT's folders, single files of kohya's and diffusers'
naming.
"""
