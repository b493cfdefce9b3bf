from entropy_polarity.cli import main

main()
