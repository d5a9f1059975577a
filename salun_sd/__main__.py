from salun_sd.cli import main

main()
