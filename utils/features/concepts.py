"""Known concepts: lists of single words of one kind.

Reference: "Scaling Monosemanticity", Feature Completeness, which takes such lists from the web.
"""

CONCEPTS = {
    "chemical elements": """
        hydrogen helium lithium beryllium boron carbon nitrogen oxygen fluorine neon sodium
        magnesium aluminium aluminum silicon phosphorus sulfur sulphur chlorine argon potassium
        calcium scandium titanium vanadium chromium manganese iron cobalt nickel copper zinc gallium
        germanium arsenic selenium bromine krypton rubidium strontium yttrium zirconium niobium
        molybdenum technetium ruthenium rhodium palladium silver cadmium indium tin antimony
        tellurium iodine xenon caesium barium lanthanum cerium praseodymium neodymium promethium
        samarium europium gadolinium terbium dysprosium holmium erbium thulium ytterbium lutetium
        hafnium tantalum tungsten rhenium osmium iridium platinum gold mercury thallium lead bismuth
        polonium astatine radon francium radium actinium thorium protactinium uranium neptunium
        plutonium americium curium berkelium californium einsteinium fermium mendelevium nobelium
        lawrencium""",
    "countries": """
        Afghanistan Albania Algeria Andorra Angola Argentina Armenia Australia Austria Azerbaijan
        Bahamas Bahrain Bangladesh Barbados Belarus Belgium Belize Benin Bhutan Bolivia Bosnia
        Botswana Brazil Brunei Bulgaria Burma Burundi Cambodia Cameroon Canada Chad Chile China
        Colombia Congo Croatia Cuba Cyprus Denmark Djibouti Dominica Ecuador Egypt England Eritrea
        Estonia Ethiopia Fiji Finland France Gabon Gambia Georgia Germany Ghana Greece Grenada
        Guatemala Guinea Guyana Haiti Honduras Hungary Iceland India Indonesia Iran Iraq Ireland
        Israel Italy Jamaica Japan Jordan Kazakhstan Kenya Korea Kosovo Kuwait Kyrgyzstan Laos
        Latvia Lebanon Lesotho Liberia Libya Liechtenstein Lithuania Luxembourg Macedonia Madagascar
        Malawi Malaysia Maldives Mali Malta Mauritania Mauritius Mexico Micronesia Moldova Monaco
        Mongolia Montenegro Morocco Mozambique Namibia Nepal Netherlands Nicaragua Niger Nigeria
        Norway Oman Pakistan Palau Palestine Panama Paraguay Persia Peru Philippines Poland Portugal
        Prussia Qatar Romania Russia Rwanda Samoa Scotland Senegal Serbia Seychelles Singapore
        Slovakia Slovenia Somalia Spain Sudan Suriname Sweden Switzerland Syria Taiwan Tajikistan
        Tanzania Thailand Togo Tonga Tunisia Turkey Turkmenistan Uganda Ukraine Uruguay Uzbekistan
        Vanuatu Venezuela Vietnam Wales Yemen Yugoslavia Zambia Zimbabwe""",
    "cities": """
        Aleppo Algiers Amsterdam Ankara Antwerp Athens Atlanta Auckland Baghdad Baltimore Bangalore
        Bangkok Barcelona Beijing Beirut Belfast Belgrade Berlin Birmingham Bogota Bologna Bombay
        Bordeaux Boston Brisbane Bristol Brussels Bucharest Budapest Cairo Calcutta Calgary
        Cambridge Canberra Casablanca Charleston Chicago Cleveland Cologne Constantinople Copenhagen
        Cork Dallas Damascus Delhi Denver Detroit Dresden Dublin Edinburgh Florence Frankfurt Geneva
        Genoa Glasgow Hamburg Hanoi Havana Helsinki Hiroshima Houston Istanbul Jakarta Jerusalem
        Johannesburg Kabul Karachi Khartoum Kiev Kyoto Lagos Leeds Leipzig Lima Lisbon Liverpool
        London Lyon Madrid Manchester Manila Marseille Melbourne Memphis Miami Milan Milwaukee
        Minneapolis Minsk Montreal Moscow Mumbai Munich Nagasaki Nairobi Naples Nashville Odessa
        Osaka Oslo Ottawa Oxford Paris Philadelphia Phoenix Pittsburgh Portland Prague Quebec
        Richmond Riga Rome Rotterdam Sacramento Santiago Sarajevo Seattle Seoul Seville Shanghai
        Sofia Stockholm Stuttgart Sydney Tehran Tokyo Toronto Tripoli Tunis Turin Utrecht Vancouver
        Venice Vienna Vilnius Warsaw Washington Wellington York Zagreb Zurich""",
    "animals": """
        ant antelope ape bat bear beaver bee beetle bird bison boar buffalo bull butterfly calf
        camel cat caterpillar cattle chicken chimpanzee cobra cod cow coyote crab crane cricket
        crocodile crow deer dog dolphin donkey dove dragonfly duck eagle eel elephant elk falcon
        ferret finch fish flea fly fox frog gazelle giraffe goat goldfish goose gorilla grasshopper
        gull hamster hare hawk hedgehog hen heron herring hippopotamus hornet horse hound hyena
        jackal jaguar jellyfish kangaroo kitten koala lamb leopard lion lizard lobster locust louse
        lynx mackerel magpie mammoth mole monkey moose mosquito moth mouse mule nightingale octopus
        ostrich otter owl ox oyster panda panther parrot partridge peacock pelican penguin pheasant
        pig pigeon pony porcupine puppy quail rabbit raccoon ram rat raven reindeer rhinoceros robin
        salmon scorpion seal shark sheep shrimp snail snake sparrow spider squid squirrel stag stork
        swallow swan tiger toad trout turkey turtle viper vulture walrus wasp weasel whale wolf worm
        wren zebra""",
    "foods": """
        ale almond apple apricot asparagus avocado bacon banana barley basil bean beef beer berry
        biscuit brandy bread broccoli broth butter cabbage cake candy carrot cauliflower celery
        champagne cheese cherry chestnut chocolate cider cinnamon clove cocoa coconut coffee cookie
        corn cream cucumber curry custard date dough dumpling egg fig flour garlic ginger grape
        gravy ham hazelnut honey jam jelly juice kale ketchup lard leek lemon lentil lettuce lime
        lobster macaroni maize mango margarine marmalade mayonnaise meat melon milk millet mint
        molasses mushroom mustard mutton noodle nutmeg oat oil olive omelette onion orange oregano
        pancake papaya parsley pasta pastry pea peach peanut pear pepper pickle pie pineapple pizza
        plum popcorn pork porridge potato pudding pumpkin radish raisin rice rum rye saffron sage
        salad salt sandwich sauce sausage soup soy spaghetti spinach steak stew strawberry sugar
        syrup tea thyme toast tofu tomato turnip vanilla veal vinegar walnut watermelon wheat whisky
        wine yeast yogurt""",
}
CONCEPTS = {name: tuple(words.split()) for name, words in CONCEPTS.items()}
