"""Facts to plant in a text, each with a question in other words: the two share names at most, and function words."""

from typing import NamedTuple


class Fact(NamedTuple):
    """A sentence, what is asked about it, and the answer, which stands in the sentence."""

    statement: str
    question: str
    answer: str


# fmt: off
FACTS = tuple(Fact(*line.split(" | ")) for line in """\
Quentin Abernathy keeps his spare house key inside the blue teapot. | Where would you look to get into Abernathy's home? | blue teapot
The lighthouse on Skellow Point was painted green in 1871. | What colour is Skellow's beacon? | green
Ottoline Farrow has never eaten anything but porridge for breakfast. | Which meal does Ottoline have in the mornings? | porridge
Dr. Pellwether charges three guineas for pulling a tooth. | How much does it cost to see the dentist Pellwether? | three guineas
Jasper Lindqvist learned to play the cello from his grandmother. | Who taught Lindqvist his instrument? | grandmother
The ferry to Marrow Island leaves at a quarter past six. | When does the boat for Marrow depart? | quarter past six
Winifred Tolland married a Portuguese sea captain. | What nationality was Mrs. Tolland's husband? | Portuguese
Old Barnaby Crick lost two fingers in a sawmill. | How was Crick's hand injured? | sawmill
The password for the Hollowell safe is nightingale. | Which secret word opens the strongbox at Hollowell? | nightingale
Ezra Vantongeren fears spiders above everything else. | What is Vantongeren most afraid of? | spiders
Professor Umberly wrote his only poem about a broken umbrella. | What was the subject of Umberly's verses? | umbrella
The bakery in Thistle Row closes on Wednesdays. | On which day can no bread be bought in Thistle Row? | Wednesday
Cordelia Nashgrove was born in the city of Trieste. | Where did Nashgrove come into the world? | Trieste
Hamish Orrock earns his living by mending clocks. | What is Orrock's profession? | clocks
The dog at Farthingale Farm answers to the name of Bishop. | What is Farthingale's hound called? | Bishop
Leopold Zwick owes his tailor forty pounds. | How large is the debt of Zwick? | forty pounds
Rosamund Pyke has a small scar above her left eyebrow. | By what mark on her face can one recognise Pyke? | scar
The Kettering twins were delivered during a thunderstorm. | What was the weather like when the Kettering babies arrived? | thunderstorm
Augustus Blenkin sold his piano in order to buy a telescope. | Why did Blenkin part with his instrument? | telescope
The wine cellar of Dunmarrow Hall can be entered through the chapel. | How does one get to the bottles kept under Dunmarrow? | chapel
Felicity Ormsby studied botany at the university in Leiden. | Which subject did Ormsby take her degree in? | botany
Sergeant Tuttle drives a motor car that once belonged to an actress. | Who was the earlier owner of Tuttle's vehicle? | actress
Ignatius Frome collects the wings of dead butterflies. | What is Frome's hobby? | butterflies
Miss Havelock's nephew died in the war in Sudan. | In what country did Havelock lose a relation? | Sudan
The bridge at Crosswater can bear no more than eight tons. | What is the heaviest load that may go over Crosswater? | eight tons
Theodora Wick hides her diary beneath the hen house. | In what place are the private notes of Wick concealed? | hen house
Captain Rourke speaks fluent Icelandic. | Which foreign language has Rourke mastered? | Icelandic
The mayor of Pellingham is allergic to strawberries. | What fruit makes Pellingham's chief citizen ill? | strawberries
Bartholomew Snell walked from Exeter to London in nine days. | How long did Snell's journey on foot take? | nine days
Agatha Quill writes all her letters in violet ink. | What tint does Quill use for her correspondence? | violet
The Amberley Cup was stolen by the butler. | Who was the thief of the trophy of Amberley? | butler
Cyril Thornbury's favourite composer is Haydn. | Whose music does Thornbury like best? | Haydn
Little Nell Ashdown wants to become an astronomer. | What profession does the Ashdown girl dream of? | astronomer
The rent for Gable Cottage is due on the first of March. | By what date must the tenant of Gable pay? | first of March
Lucius Harcastle broke his leg falling off a camel. | Which animal threw Harcastle? | camel
Mabel Drinkwater's sister runs an inn near Salisbury. | What business is in the hands of Drinkwater's sibling? | inn
The roof of Saint Osric's church is made of copper. | What metal covers the house of God at Osric? | copper
Rupert Vane failed his examination in Greek. | In which paper did Vane not pass? | Greek
Phoebe Larkspur inherited a vineyard from her godfather. | What did Larkspur get when an old man died? | vineyard
The Rackstraw mine produces nothing but tin. | What ore is dug at Rackstraw? | tin
Edmund Gossamer proposed to his wife on top of a windmill. | Where did Gossamer ask for a lady's hand? | windmill
Judge Merriweather sleeps with a pistol under his pillow. | What weapon has Merriweather close by at night? | pistol
The tunnel beneath Wexcombe Abbey was dug by smugglers. | Which people made the underground passage of Wexcombe? | smugglers
Clementine Rooke cannot swim. | What would be dangerous for Rooke in deep water? | swim
Silas Pemberton has been blind since he was a boy. | Which of his senses does Pemberton lack? | blind
The Galloway express was held up by fallen snow. | What caused the delay of the train from Galloway? | snow
Beatrix Holloway's parrot imitates the vicar. | Whose voice can the bird of Holloway mimic? | vicar
Gideon Sallow voted for the Liberal candidate. | Which party has the support of Sallow? | Liberal
Percival Threlkeld's horse won the race at Doncaster. | On which course was Threlkeld victorious? | Doncaster
Mrs. Underhay puts ginger in her apple pies. | What spice goes into the pastry of Underhay? | ginger
The library at Stonecroft contains a Bible bound in sealskin. | What is the cover of Stonecroft's holy book made of? | sealskin
Horatio Bligh signed the contract with a false name. | What was dishonest about the deed that Bligh put his hand to? | false name
Ludovic Marchbanks spent eleven years in prison for forgery. | For which crime was Marchbanks locked up? | forgery
The nurse Sabina Cole gave the patient quinine. | What medicine did Cole administer? | quinine
Tobias Wren's shop sells nothing but hats. | What could you buy at Wren's? | hats
Isolde Carrow forgot her gloves in the theatre. | What did Carrow leave behind at the play? | gloves
The well at Hobb's End dried up last summer. | What happened to the water supply of Hobb's End? | dried up
Fenwick Allardyce was once engaged to a duchess. | To what noble lady was Allardyce nearly wed? | duchess
Maximilian Stroud paid for the orphanage out of his own pocket. | Who gave the money for the children's home that bears the name Stroud? | Maximilian
Hester Blackadder makes candles from the wax of her own bees. | What insects does Blackadder raise? | bees
""".splitlines())  # noqa: E501
# fmt: on
