from whorl.cli import main

main()
