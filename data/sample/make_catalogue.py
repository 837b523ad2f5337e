"""Write the sample catalogue: 2,000 items of an invented video-game shop, the same bytes on every run.

    python data/sample/make_catalogue.py      # data/output/Sample_items_updated.parquet

All names of companies, consoles, series and characters are invented. A seed makes one shop with its own names:
seed 0 makes the shipped catalogue, and train_encoder.py learns from other seeds too.

Most of this file is templates. In a template, [a|b] is a choice and {hero} is a slot for a name.
"""

import random
import re
from dataclasses import dataclass
from pathlib import Path

import polars as pl

OUTPUT = Path(__file__).resolve().parents[1] / "output" / "Sample_items_updated.parquet"
QUOTAS = {"game": 1000, "gear": 580, "merch": 310, "console": 80, "credit": 30}
words = str.split


def phrases(text: str) -> list[str]:
    """Split text at its semicolons."""
    return " ".join(text.split()).split("; ")


def parse(text: str) -> dict[str, dict[str, list[str]]]:
    """Parse blocks into {name: {key: [phrases], "sentences": [sentences]}}.

    A block starts with "= name". A line "key: a; b" is a list, any other line is a sentence.
    An indented line continues the line above it.
    """
    blocks = {}
    for line in re.sub(r"\n +", " ", text).strip().splitlines():
        if line.startswith("= "):
            block = blocks[line[2:]] = {"sentences": []}
        elif found := re.match("([a-z]+): ", line):
            block[found[1]] = phrases(line[found.end() :])
        else:
            block["sentences"].append(line)
    return blocks


# ---- Names ----

STARTS = words("""
    Alv Ank Arr Bael Bend Bram Brev Cald Carv Corv Dask Delv Dorm Drev Elg Emb Esk Fal Fend Fostr Gald Garn Gorm
    Grell Halv Hask Hest Ild Inv Jask Jorv Kald Kell Kest Korr Lamb Lask Lind Lorv Mald Mard Merr Mosk Nald Nev
    Norv Obr Ord Ostr Parv Pell Pind Prosk Quell Quor Rald Rask Rend Rosk Sald Selv Skarr Sorv Tald Tavr Tesk
    Thorv Torm Ulv Umb Vald Vesk Vind Vorr Wald Wend Wisk Yald Yend Yorr Zald Zelv Zind
""")
MIDDLES = words("am an el en er im ol or un")
SYLLABLES = {  # style of a name: middles and ends
    "person": (["", "", *MIDDLES], words("a an ara ek el ena essa eth ia ick iko in is o ora ova une wen yn")),
    "place": (
        [""],
        words("""
            aby acre ashore ebeck ecrag edale efell ehaven eholt emarch emere emoor ereach estead evale iwick olake
            opass orock owell umouth
        """),
    ),
    "word": (
        ["", "", "", *MIDDLES],
        words("ando aris avo axi ello endra ero exa idor ilo inax ix onda oro oss ua umbra une ura yx"),
    ),
}
# Real names that these syllables can make.
REAL_NAMES = words("aldi anker lindor merrel ormond tormax walden wendy")

COMPANIES = words("Interactive Games Studio Works Entertainment Digital Workshop Playhouse Collective Arcade")
FACTORIES = words("Electronics Labs Systems Computer Industries")
BRAND_SUFFIXES = ["", "", "", " Gear", " Audio", " Labs", " Supply", " Works", "tek", " & Co."]
LICENSEE_SUFFIXES = [" Collectibles", " & Sons", " Toys", "", " Print"]
FORMS = ["home console", "handheld console", "virtual-reality headset", "home computer"]
PLATFORMS = [  # name, number of the maker, form, medium, years after the first console
    ("{home}", 0, "home console", "cartridge", 0),
    ("{home} 2", 0, "home console", "disc", 7),
    ("{home} 3", 0, "home console", "disc", 14),
    ("{rival}", 1, "home console", "disc", 3),
    ("{rival} [Next|Prime|Max|Ultra]", 1, "home console", "disc", 15),
    ("{pocket} [Pocket|Mini|Go]", 2, "handheld console", "game card", 5),
    ("{pocket} Duo", 2, "handheld console", "game card", 13),
    ("{headset} VR", 1, "virtual-reality headset", "download code", 18),
    ("PC", 3, "home computer", "disc", 0),
]
MODELS = words("""
    Arc Anvil Beacon Brisk Comet Crest Drift Ember Flint Harbour Heron Ivory Kite Lark Marble Nimble Orbit Pike
    Quarry Ridge Rook Slate Swift Tern Vector Willow Zenith
""")
COLOURS = phrases("""
    black; white; graphite; crimson; sea blue; forest green; smoke grey; coral; lilac; mustard; sand;
    clear purple; midnight blue; copper; mint; matte black; pearl white; burnt orange
""")
RELICS = phrases("""
    Amber Bell; Black Lantern; Bone Flute; Broken Crown; Clockwork Heart; Copper Key; Drowned Mirror; Ember Seed;
    Glass Compass; Hollow Star; Ivory Mask; Last Ledger; Moon Anchor; Pale Chalice; Salt Throne; Silver Loom;
    Storm Needle; Ninth Page; Tin Oracle; Winter Seal; Red Abacus; Iron Lullaby; Seventh Thimble; Chalk Horse
""")
EDITIONS = ["Deluxe Edition", "Collector's Edition", "Remastered", "Complete Edition", "Launch Edition"]
ROMAN = ["I", "II", "III", "IV", "V"]
TAGLINES = phrases("""
    Mind the third stair; Nobody owns the tide; We all come home hungry; Keep your lamp low; Even stones listen;
    One good turn; Trust the goat; Not every door is a door; Louder than the rain; Leave only footprints;
    The road remembers; Ask the river; Bring your own thunder; Small hands, big plans; Never bet against the moon;
    There is always a second key; Hold the line, then dance; Dawn is a long way off
""")
EXTRAS = phrases("""
    a cloth map; a steel case; a set of art cards; an enamel pin; a mini soundtrack; a 64-page sketchbook;
    a folded poster; a pewter coin; a patch; a paper model; a deck of playing cards; a small figure of {hero}
""")

# ---- Templates of games: a block for each genre. names and nouns make titles ----

GENRES = parse("""
= racing
label: racing game; arcade racer; rally game
names: {q} Rally; Redline {q}; {w} Grand Circuit; {p} Hillclimb; Six Laps to {q}
nouns: Night Stage; Gravel Crown; Coast Road; Final Lap; Mountain Pass; Wet Tarmac
role: test driver; rally champion; getaway driver
age: 3; 7
features: [24|31|40] cars, none of them real; split-screen for [two|four] players; a photo mode for every car; full
  damage modelling; weather that changes mid-race; ghost laps to chase; a track editor; manual and automatic gears
[Slide|Drift|Power] through [hairpins|chicanes|blind crests] on [fourteen|nineteen|twenty-two] tracks between {place}
  and {other}.
Tyres wear, fuel burns and the [rain|fog|dust] rolls in, so [pit strategy|a cool head] matters as much as raw speed.
Tune [gear ratios, ride height and downforce|suspension, brakes and boost] in the garage, then [prove it|take it out]
  on the track.
The career starts with a [rusty hatchback|borrowed coupe|second-hand buggy] and ends on the podium of the {place} Cup.
Rivals such as {villain} remember who [pushed them off the road|cut them up] and will [return the favour|hold a
  grudge].
{hero} knows every shortcut around {other}; [keep up|stay in the slipstream] and you may learn them too.
Handling is [easy to pick up|forgiving at first] but there is always another tenth of a second to find.
Wheel users get [strong force feedback|a dedicated cockpit view] and a proper clutch.
= farming
label: farming game; farm life simulation; country life game
names: {q} Acres; {p}'s Orchard; Seasons of {q}; {q} Homestead; Little Farm in {q}
nouns: New Soil; Honey Year; Second Harvest; Winter Barn; Market Day; The Old Mill
role: young farmer; beekeeper; retired sailor
age: 3
features: four seasons with their own crops; [30|45|60] villagers to befriend; cows, goats and one very rude goose; a
  greenhouse to restore; cooperative play on one farm; fishing, mining and baking; a yearly vegetable contest
Inherit a [run-down|overgrown|flooded] farm outside {place} and bring it back to life, [one turnip|one fence post] at
  a time.
Plant in spring, water through summer, [bottle jam|press cider] in autumn and mend your tools by the fire in winter.
The villagers of {place} have [birthdays, quarrels and favourite cakes|secrets they share only with a good neighbour].
{friend} runs the [general store|bakery|feed shop] and buys whatever you grow, though prices change with the weather.
Breed [sheep|alpacas|hens] for better wool and eggs, or let the fields go wild and keep bees instead.
There is no clock to beat and nobody to defeat: [play at your own pace|stop whenever the kettle boils].
When {villain} plans to [pave the valley|buy up the river], the whole village looks to you.
Decorate the farmhouse with [hundreds of|over two hundred] pieces of furniture, from rag rugs to a grand piano.
= tactical role-playing
label: tactical role-playing game; turn-based strategy RPG; tactics game
names: Banners of {q}; {w} Tactics; The {q} Chronicle; Oath of {p}; {q} Vanguard
nouns: The Broken Oath; Siege of Ash; Winter Campaign; Twin Thrones; The Exile King; Red Banner
role: exiled captain; squire; young queen
age: 12
features: [18|24|32] unit classes; permanent loss for those who dare; branching chapters; a full orchestral score;
  battles on terrain with real height; an optional easy mode without permanent death; forging and weapon repair
Command a company of [knights, archers and hedge mages|mercenaries and deserters] on grid battlefields where height,
  weather and facing decide every blow.
{hero}, [an exiled captain|the last heir of {place}], must choose between the crown and the soldiers who bled for it.
Each recruit has a [name, a past and a temper|family, a debt and a breaking point]; when one falls, the others
  remember.
Bonds formed at the campfire turn into [paired attacks|shared guard stances] on the field.
The war between {place} and {other} splits the story in [two|three] and no single play-through shows it all.
Turn order is always visible, so a [clever feint|well-placed shield wall] beats brute strength.
{villain} commands the northern host and [adapts to the formations you favour|never uses the same ruse twice].
Between battles, [train at the barracks, trade with caravans|repair the keep, settle quarrels] and read the maps.
= platformer
label: platformer; jump-and-run adventure; platform game
names: {p} and the {r}; Hop, {p}, Hop; {p}'s Big Climb; Super {w} Dash; The Jolly {w}
nouns: Cloud Kingdom; Upside Down; Treetop Trouble; The Great Bounce; Pocket Planet; Lost Buttons
role: tiny fox; wind-up robot; runaway button
age: 3; 7
features: [60|85|110] hand-drawn levels; drop-in play for two; secret exits everywhere; a time-trial medal in each
  stage; six costumes with new moves; boss fights the size of a house; an assist mode for younger players
[Run, bounce and wall-jump|Leap, glide and butt-stomp] through worlds made of [paper|jelly|old clockwork|knitted
  wool].
{hero} has lost [a hat|every last button|the way home] and the trail leads straight up the tower of {villain}.
Controls are [tight as a drum|crisp and immediate], and a fall never sends you back more than a few seconds.
Team up with {friend}, who can [hover for a moment|be thrown across gaps|squeeze through keyholes].
Every world adds one new idea, from [magnetic boots|bouncing umbrellas] to gravity that flips at the beat of a drum.
Find the [hidden feathers|golden acorns|spare cogs] and open a final set of stages that will test even experts.
Younger players can [float past trouble in a bubble|turn on extra hearts], so the family can finish it together.
The {place} stages are [a love letter to sunny afternoons|bursting with colour], the ice caves rather less kind.
= puzzle
label: puzzle game; brain teaser; logic game
names: {w} Tiles; {p}'s Puzzle Box; Unfold {w}; Quiet Boxes of {q}; {w} Lines
nouns: One More Turn; Mirror Rooms; Small Hours; The Missing Piece; Tangle; Second Thoughts
role: clockmaker; librarian; museum guard
age: 3
features: more than [200|350|500] puzzles; a daily challenge; a gentle hint system; a level editor and sharing by
  code; colour-blind patterns; one-handed controls; a calm piano soundtrack; no timers unless you want them
[Slide|Rotate|Fold] the pieces until the picture makes sense, then discover that it had [a second meaning|another
  side].
The rules fit on a postcard; the [last fifty levels|final chapter] will keep you up all night.
Each box in the workshop of {hero} opens in a different way: [by light|by weight|by sound|by patience].
Stuck? {friend} offers a [nudge|riddle] rather than an answer.
A new mechanism arrives every ten levels, and old ones come back [in mischievous pairs|when you least expect them].
Play [a five-minute round on the bus|for a quiet evening] and your progress is kept to the very move.
Two players can solve [side by side or race on a split board|the larger boards together].
No guessing is ever needed: every board has [exactly one solution|a path that logic alone can find].
= football
label: football game; football simulation; street football game
names: {q} League Football; {w} Eleven; Goal! {q}; {p} Street Football; {q} Terrace Manager
nouns: Cup Run; Promotion; Derby Day; Extra Time; Golden Boot; Home Ground
role: young striker; ageing goalkeeper; caretaker manager
age: 3
features: [12|20|26] invented leagues; local matches for four; a full transfer market; women's and men's competitions;
  a kit and crest editor; weather that changes the pitch; commentary by {friend}; penalty shoot-out mode
Take a [village side|newly promoted club|bankrupt team] from the muddy pitches of {place} to the final under lights.
Passing is weighted by [foot, balance and pressure|body shape and timing], so a scuffed ball looks and feels right.
Scout teenagers in {other}, haggle with agents and [balance the books|keep the board happy] until the window shuts.
{hero} is the striker everybody wants; {villain} is the [chairman|defender] who will not make it easy.
Set tactics with [three sliders|a simple chalkboard], or call for the press and the overlap as you play.
Rain slows the ball, snow brings out the orange one, and the [crowd|away end] never stops singing.
A career spans [fifteen|twenty] seasons as [player, captain and finally manager|manager and then director].
The new goalkeepers [rush, parry and sulk|read the taker's run-up] like their real colleagues.
= fighting
label: fighting game; one-on-one fighter; arena brawler
names: {w} Fist; {q} Brawl; Knuckles of {q}; {p} Versus; {w} Arena
nouns: Final Round; Iron Stance; Double Impact; Tournament; Heavy Weather; Last One Standing
role: dockside boxer; masked wrestler; temple guardian
age: 12; 16
features: [16|22|28] fighters; rollback netcode; a training mode with frame data; four-player local tournaments;
  classic and simple controls; an arcade ladder with endings; a colour editor; replays with input display
[Sixteen|Twenty-two] fighters from {place} to {other} settle their scores in rounds that rarely last a minute.
{hero} fights with [open palms and patience|a boxer's footwork], {villain} with [chains|dirty tricks|brute force].
Build meter by [attacking|parrying at the last moment] and spend it on [a reversal|a cinematic finisher].
Combos are short and [the neutral game is everything|mistakes are costly], which keeps matches tense to the end.
Newcomers learn from [a patient tutor|{friend}'s dojo], veterans find frame data and hit boxes in training mode.
Stages [break apart|change with each round]: floors give way, fences fall and the crowd moves back.
Tag in {friend} for an assist or go [alone|solo] for a damage bonus.
Arcade sticks and pads are both supported, with [remapping for every button|no input delay worth the name].
= horror
label: survival horror game; horror adventure; psychological horror game
names: The Cellar at {q}; {q} Asylum; What {p} Saw; The {w} Tapes; Below {q}
nouns: The Ninth Door; Candle Hour; Static; The Long Corridor; Burial; No Lights
role: night nurse; radio engineer; missing girl's brother
age: 16; 18
features: several endings; a sound design best heard on headphones; scarce ammunition; no two nights alike; an option
  to hide the spiders; photo evidence to collect; a chilling first-person view; a nightmare difficulty
[The lights go out at ten|The phone rings at three every night] in {place}, and something begins to walk the halls.
You are {hero}, [a night nurse|a radio engineer|the new caretaker], and the door you came in by is [gone|bricked up].
Ammunition is [scarce|counted in single bullets], batteries die, and hiding is often the wiser choice.
{villain} hunts by [sound|smell|candlelight]: walk slowly, close doors and hold your breath.
The story of the {other} disappearances is told through [tape recordings|letters and torn photographs].
Puzzles grow out of the house itself, from [a piano missing three keys|a clock that runs backwards] to worse.
Headphones are strongly advised; so is [a lamp left on|company].
Your choices in the [chapel|cellar|flooded ward] decide who is alive at dawn.
= space strategy
label: space strategy game; 4X strategy game; star empire game
names: {w} Dominion; Stars over {q}; {w} Ascendant; The {w} Accord; Fleets of {q}
nouns: First Contact; Dark Between; Colony Ships; Border Suns; The Long Fall; Shattered Ring
role: fleet admiral; colony governor; alien envoy
age: 7; 12
features: [9|12|14] playable species; galaxies of up to [400|900] stars; a ship designer; asynchronous multiplayer;
  diplomacy with trade, spying and marriage; mod support; a tutorial campaign; real-time fleet battles with pause
[Found|Settle] a first colony at {place} and grow it into an empire that spans [a thousand|hundreds of] stars.
Design every ship, from [mining tugs|scouts] to dreadnoughts, out of modules that [compete for power|weigh on the
  hull].
Species such as the [Orrindel|Vashtune|Quellic] do not think like us, and their [treaties|insults] need careful
  reading.
Research is dealt like a hand of cards, so no two [empires|games] follow the same path.
Admiral {hero} holds the [ring gate|border worlds]; beyond it waits {villain}, and behind that an older silence.
Supply lines matter: a fleet without [fuel and spare parts|a friendly dock] is only scrap with flags on.
Trade, spy, terraform or [preach|blockade] your way to one of [five|seven] victories.
A full game takes [an evening on a small map|a long weekend on a large map]; saves can be shared.
= rhythm
label: rhythm game; music game; dance game
names: {w} Beat; Tap Tap {w}; {p} Dance Hall; {q} Marching Band; Drum Street {w}
nouns: Encore; Remix; Midnight Set; Street Parade; B-Side; Hands Up
role: busking drummer; shy DJ; brass band leader
age: 3; 7
features: [45|60|80] original songs; five difficulty levels; a calibration tool for any screen; party mode for eight;
  support for dance mats and drum pads; a no-fail mode; weekly score tables; a lyric video for every track
[Tap, hold and flick|Step, slide and clap] to [fifty|sixty-odd] original songs from brass to breakbeat.
{hero} wants to win back the [bandstand|dance hall] of {place}, one [gig|street party] at a time.
Notes fly in from all sides, but the beat never lies: [close your eyes|trust your ears] and you may score better.
Easy charts follow the melody, expert ones [every ghost note of the drums|what your fingers wish were impossible].
{friend} joins as second player on [bass|tambourine|keys], and the [chorus|crowd] gets louder with every streak.
The [mat|drum] is optional; the pad works just as well and your [neighbours|knees] will thank you.
Slow any section down in practice mode until [it sits|your hands remember it].
Genres run from [swing to drum and bass|sea shanties to synth pop], all recorded by the {studio} house band.
= action role-playing
label: action role-playing game; open-world RPG; fantasy action RPG
names: {w} Saga; The {r} of {q}; Legend of {p}; {q} Reborn; Tales from {q}
nouns: The Sleeping God; Ashen Road; Heart of Winter; Crown of Thorns; The Last Ember; Wolf Moon
role: wandering swordsmith; cursed knight; village healer
age: 12; 16
features: more than [60|80|120] hours of quests; crafting with [90|140] recipes; day and night cycles; two new game
  modes; companions with their own stories; real-time combat with a dodge roll; a hand-painted world map; full voice
  acting
An open land of [moors, drowned cities and glass deserts|forests, salt flats and ruined keeps] stretches from {place}
  to {other}, and you may walk all of it.
{hero} carries the {relic}, and everyone from {villain} to the [beggars|crows] of {place} wants it.
Combat is [fast and readable|weighty and fair]: watch the shoulders, dodge the sweep, punish the pause.
Mix [blade, bow and spell|alchemy and swordplay] freely, since skills belong to what you do and not to a class.
Companions like {friend} have [opinions|limits] and will leave if you cross them once too often.
Side quests are stories in their own right: [a widow's bell|a goat on trial|a bridge that asks for names].
Gather herbs, cook stews and forge [a named sword|armour plate by plate] at any campfire.
Dungeons are few but deep, each with a [secret floor|keeper who talks before fighting].
= shooter
label: shooter; first-person shooter; sci-fi shooter
names: {w} Protocol; Breach {w}; {q} Outpost; Operation {w}; Iron {w}
nouns: Last Signal; Fallback; Black Site; Dust Line; Counterfire; Rear Guard
role: drop-ship medic; colony ranger; rogue android
age: 16; 18
features: a campaign of [9|12|15] missions; matches for up to [16|24|32] players; split-screen co-op; bot matches
  offline; vehicles with every seat playable; a firing range; gyro aiming; a stat page for every weapon
[Drop|Crash-land] on {place} with a squad of four and [hold the line|find out why the beacon stopped].
Weapons kick, jam and [overheat|echo down corridors] differently, and each can be rebuilt at the bench.
{hero}, a [drop-ship medic|ranger with nothing left], leads the retreat from {other} that turned into a war.
Enemy squads [flank, suppress and retreat|call for help and drag off their wounded], led by the machine called
  {villain}.
Multiplayer brings [capture, escort and siege modes|eleven maps] for quick rounds after work.
Clear the campaign alone or with {friend} at your side: [a friend may join at any checkpoint|the second seat is free].
Levels open up into [wide valleys|multi-storey arenas] with more than one way to the goal.
Shields recharge, health does not, and the [shotgun|rail rifle] solves most arguments.
= flight
label: flight simulator; air combat game; aviation game
names: {q} Airfield; {w} Wings; {p} Flying Circus; Crosswind {q}; {w} Squadron
nouns: Night Mail; High Pass; Carrier Season; Thin Air; Island Hopper; Storm Front
role: mail pilot; stunt flyer; crop duster
age: 3; 7
features: [14|22|30] aircraft with clickable cockpits; live-feeling weather; a flight school of [18|25] lessons;
  joystick, throttle and pedal support; air traffic control chatter; a replay camera; night landings with real star
  maps
[Carry the mail|Ferry doctors] over the mountains of {place} in aircraft that [rattle, ice up and forgive|feel alive].
Every switch in the cockpit works, yet [assists can handle|{friend} can take over] what you would rather not.
Weather fronts move over the map for real: [wait for a gap|fly around], or learn what crosswind means.
{hero} founded the flying circus; {villain} means to [ground it|buy it plane by plane].
Lessons run from [straight and level|first take-off] to a dead-stick landing on a {other} beach.
Fly from [grass strips to carrier decks|bush strips to the great harbour of {place}] and log every hour.
With a flight stick the trim is [a joy|half the fun]; a pad gets sensible shortcuts instead.
Dogfights are won with [height and patience|energy and nerve] rather than with the trigger.
= city building
label: city builder; town-building game; management simulation
names: {q} Rising; {w} City Works; Mayor of {q}; {q} Boroughs; Bridges of {q}
nouns: Harbour Town; Smoke and Steam; Garden Suburbs; Tramlines; High Water; New Foundations
role: town clerk; first mayor; river engineer
age: 3
features: [120|180|260] buildings; trams, ferries and cable cars; scenarios with [12|20] set goals; a sandbox without
  money; seasons and floods; a citizen you can follow all day; blueprint sharing; speed control and pause building
Lay the first [street|tramline|quay] of {place} and watch a muddy ford become a city of half a million.
Citizens walk, queue, complain and [move house|write to the paper]; follow any of them from breakfast to bed.
Balance [power, water and patience|taxes, traffic and trees] while {villain} bids for every corner plot.
The river [floods each spring|silts up], so the engineer {hero} will want dikes before you want a stadium.
Districts have [their own laws and music|characters of their own], from the docks to the hill villas.
Trams, ferries and [cable cars|canal boats] join up in timetables you can set to the minute.
Ruins of old {other} lie under the map: [preserve, build over|dig up] or charge admission.
Disasters are optional, [debt|council meetings] less so.
= detective
label: detective game; mystery adventure; point-and-click adventure
names: Inspector {p}; The {q} Affair; {p} Investigates; Murder at {q}; The {w} Dossier
nouns: The Silent Guest; Ink and Arsenic; The Last Ferry; Cold Tea; A Borrowed Name; Third Alibi
role: retired inspector; newspaper reporter; forger
age: 7; 12
features: [6|8|11] self-contained cases; a notebook that links clues; full voice acting; no dead ends; a hint line;
  hand-painted scenes; suspects who change their story; several solutions, one of them true
[A body in the conservatory|A missing ferry|A forged will], eleven guests and one road out of {place}: begin.
{hero} listens more than talks; pick the right [silence|question] and alibis come apart on their own.
Link [tickets, stains and gossip|clues in the notebook] until the timeline holds, then accuse, and live with it.
{friend} keeps the [case file|motor running] and makes the remarks that you were thinking.
The scenes of {other} were painted [by hand in gouache|in ink and wash] and reward a slow look.
Suspects lie for good reasons; even {villain} is [innocent of something|owed an apology].
Wrong accusations do not end the game, but the [paper prints them|town remembers].
Each case lasts about [two hours|an evening], ideal for playing aloud with the family.
= stealth
label: stealth game; stealth action game; heist game
names: Shadow of {q}; {w} Thieves; The {p} Heist; Soft Steps in {q}; Cloak & {w}
nouns: Inside Job; Velvet Rope; Rooftops; The Quiet Year; Double Blind; Paper Walls
role: retired burglar; court spy; cat-footed courier
age: 12; 16
features: [10|14] open missions; a no-kill medal; tools from marbles to smoke; guards with real routines; a heist
  planner; leaderboards for ghosts; a replay map of every step; custom difficulty by sense
Light, noise and [gossip|wet footprints] give you away; [curtains, crowds and good timing|rooftops and rain] do not.
{hero} returns for one last job in {place}: steal the {relic} before {villain} [sells|melts] it.
Guards follow real routines: they [gossip, doze and swap shifts|notice an open door, and who opened it].
Each mansion can be entered in [a dozen ways|more ways than it has doors], from the coal chute to the front hall.
Plan the route on a [chalk model|stolen blueprint], then improvise when {friend} coughs.
Not a single kill is needed, and the best [ratings|fees] go to those who were never there.
Gadgets are few and [clever|handmade]: a marble, a mirror, a bottle of moths.
The {other} vault is the hardest level {studio} has built, and [the funniest|the quietest].
= survival
label: survival game; crafting and survival game; wilderness adventure
names: {q} Alone; Adrift near {q}; {w} Wilds; Forty Days in {q}; Cold {w}
nouns: First Frost; Driftwood; The Dry Season; Signal Fire; Deep Water; Homeward
role: stranded botanist; lighthouse keeper; ship's cook
age: 7; 12
features: an island of [16|25|40] square kilometres; crafting without menus; co-op for four; a peaceful mode; wild
  weather; animals that remember you; shelters built plank by plank; a permadeath log book
Wake on the shore of {place} with [a knife, a wet match and a radio|half a boat], and see the winter coming.
Craft by [putting things together in your hands|sketching in a journal]; there is no grid and no magic bench.
Hunger, cold and [loneliness|salt water] take turns, yet the [sunrises|stars] are worth every blister.
Wolves learn, deer wander, and a [gull called {friend}|stray dog called {friend}] may decide you are its person.
The wreck of the {other} holds [answers|tinned peaches]; so does the hut with smoke that {villain} denies owning.
Build a [raft|smokehouse|windmill], map the coast by hand and light the signal fire.
Play the story of {hero} or [a sandbox with your own rules|an endless winter].
Up to four castaways can share an island, [chores included|and one saucepan].
= cooking
label: cooking game; kitchen party game; restaurant game
names: {p}'s Kitchen; Too Many Cooks in {q}; Cafe {w}; {q} Diner Days; Stir It, {p}
nouns: Second Helping; Lunch Rush; Night Market; Sugar and Spice; Sunday Roast; Street Food
role: trainee chef; noodle vendor; grumpy baker
age: 3
features: [70|95|130] real recipes; chaos for up to four cooks; a calm solo mode; kitchens on trains and rafts; a
  recipe book to print; unlockable aprons; swap stations at any time; a three-star rating for each service
Chop, fry, plate and [shout|apologise]: [four cooks|two to four players], one stove and a queue out of the door.
The kitchens of {place} are built on [a moving train|two rafts|a sinking pier], which explains the flying soup.
{hero} inherits a [noodle stall|tea room|greasy diner] and a debt to {villain}, payable in dumplings.
Every dish is a real recipe, [tested by {studio}|with a printable card], so dinner may be better for it.
Serve the critic from {other}, who [hates coriander|sends everything back], and win the third star.
Alone, {friend} takes orders for you, and the [clock is kinder|radio plays].
Upgrade [knives, ovens and chairs|from camping stove to copper range] with the tips you earn.
Rounds last [four|five] minutes; friendships, one hopes, longer.
= fishing
label: fishing game; angling simulation; fishing adventure
names: {q} Anglers; {p}'s Tackle Box; Lakes of {q}; {w} Deep Sea Fishing; Reel {w}
nouns: Big Water; Ice Season; Dawn Cast; River Run; Trophy Waters; Fly Masters
role: river guide; lighthouse angler; fishmonger's apprentice
age: 3
features: [80|120|160] species of fish; lakes, rivers and open sea; tackle with real balance; online tournaments; a
  boat to furnish; catch and release records; rods with vibration feedback; a sonar to learn
Cast off before dawn on [nine lakes and two rivers|the cold waters] around {place} and listen for the splash.
Float, fly or [lure|bottom rig]: each fish has a favourite hour, depth and [bait|excuse].
The rod bends in your hands as the [pike|trout|catfish] runs; give line or lose it.
Old {hero} says the giant of {other} weighs [ninety|sixty] pounds; {villain} says there is no such fish.
Tie flies, mend nets and furnish a [cabin|small boat] with what the market pays.
{friend} keeps the log book and [never lets you round up|boasts on your behalf].
Tournaments run every weekend, [in sun and sleet|by weight and by number].
Relaxing music, soft rain and [nothing urgent|a thermos of tea].
= skating
label: skateboarding game; extreme sports game; snowboarding game
names: {q} Skate Co.; {w} Halfpipe; Kickflip {q}; {p} Pro Boarding; Powder {q}
nouns: Concrete Summer; Backcountry; Drop In; Loose Trucks; City Lines; Fresh Snow
role: local legend; rail rat; delivery skater
age: 7; 12
features: [9|13] open areas; a park editor; a video editor with fisheye lens; [35|50] garage bands on the soundtrack;
  trick-by-stick controls; gaps hidden on every roof; hot-seat contests; boards to paint and break
String [grinds, manuals and flips|spins, grabs and rails] into lines that run from the roofs of {place} to the pier.
One stick is your feet, the other your [weight|shoulders]; the first clean landing is [pure joy|hard won].
{hero} films, {friend} holds the van door and [security|{villain}] wants you off the plaza.
Build a dream park out of [ledges, bowls and bins|anything that slides] and share it by code.
Contests in {other} score style as well as height, so [do it smoothly|leave your hands down].
Boards chip, snap and [get stickers|earn stories], exactly as they should.
The soundtrack gathers [forty|thirty-five] garage bands you have never heard and [will not forget|may soon love].
Bail physics are [hilarious|painfully good], and the retry is instant.
= card battle
label: card battle game; deck-building game; collectible card game
names: {w} Decks; The {q} Gambit; {p}'s Wager; Arcana of {q}; {w} Draw
nouns: House Rules; The Black Suit; Opening Hand; Marked Cards; Ante Up; The Ninth Suit
role: riverboat gambler; hedge witch; card sharp
age: 7; 12
features: [240|320|450] cards; no paid packs ever; draft, duel and puzzle modes; cross-platform play; [7|9] starting
  decks; hand-painted card art; a solo campaign of [40|60] duels; a statistics page
Build a deck of [thirty|forty] cards and [climb the tower|cross the river country] of {place} one duel at a time.
Every card has two faces, [sun and moon|oath and debt], and when to turn it is the whole art.
{villain} never shuffles; {hero} never [folds|blinks]. The table in {other} waits for a third player.
All cards come [with the game|by playing]: no packs, no waiting, no fees.
Relics such as the {relic} bend the rules, and [curses|two of them together] bend them back.
Draft with friends, [solve the daily hand|chase a win streak] or replay the famous duel with {friend}.
Runs take [thirty minutes|under an hour] and no two are alike.
The illustrations by {studio} alone [fill an art book|are worth the price].
= monster taming
label: monster-taming game; creature collecting RPG; monster-raising adventure
names: {w} Tamers; {p} and the Little Beasts; {w} Menagerie; Ranch of {q}; Mossy {w}
nouns: Tide and Thorn; Egg Season; Wild Hearts; Old Friends; Night Bloom; Thunder Nest
role: apprentice keeper; egg courier; young ranger
age: 3; 7
features: [140|180|230] creatures to befriend; two-on-two battles; eggs that inherit moves; trading by local wireless;
  riding, digging and gliding; a ranch to run; odds shown openly; cooking treats for your team
Befriend [one hundred and eighty|more than two hundred] creatures, from the [moss-backed Grubbon|sleepy Tindlepup] to
  the storm bird of {other}.
{hero} leaves {place} with a [satchel, a whistle|tin lunchbox] and an egg that will not stop humming.
Battles are fought [two against two|in pairs], and the weather of the field matters as much as type.
Creatures evolve through [friendship|what they eat|where they sleep], so your team will not look like anyone else's.
{villain} steals eggs for [a parade|a private zoo]; with {friend} you will set them free.
Raise, brush and [feed them stew|let them nap] on a ranch that grows with your collection.
Trade or battle with friends [over a cable or online|across the room].
The full field guide is [in the game|a joy to fill], with footprints, songs and all.
= railway
label: train simulator; railway management game; railway game
names: {q} Junction; {w} Railways; The {q} Express; {p} Boiler Works; Branch Line {q}
nouns: Winter Timetable; Narrow Gauge; Night Sleeper; Freight Yard; Signal Box; Coast Line
role: engine driver; signalwoman; stationmaster
age: 3
features: [12|18|25] engines to drive; [90|140] miles of line; signals and points to work by hand; a timetable editor;
  steam, diesel and electric; seasons along the line; a passenger view; free driving without penalties
Drive the [milk train|night sleeper|slow goods] from {place} to {other}, on time if the leaves allow.
Fire the boiler, mind the gauge and [whistle for the crossing|ease her over the viaduct].
Work the signal box by hand: [bells, levers and a kettle|one wrong lever and the express waits].
{hero} built the line, {villain} wants it closed, and the [timetable|petition] is in your hands.
Lay track in [free mode|the editor], with gradients a real engineer would [sign|argue about].
Rain on the rails, frost on the points and {friend} in the guard's van: [no two runs are alike|lovely].
Cabs are modelled to the last [rivet|tap], and every tap does something.
Rescue a [rusting tank engine|forgotten railcar] and restore it through [forty|thirty] small jobs.
= dungeon crawler
label: dungeon crawler; roguelike; roguelite action game
names: {w} Depths; Torches of {q}; Down, {p}, Down; {q} Catacombs; The {w} Stair
nouns: One Candle; Rat King; Deeper Still; Bone Market; The Flooded Floor; Third Descent
role: gravedigger; torch bearer; disgraced wizard
age: 12
features: floors that change with every descent; [11|15] heroes; a daily seeded run; two-player co-op; [180|260]
  items; runs of forty minutes; a town that grows between deaths; a bestiary with jokes
Every descent into the vaults below {place} is [dealt anew|different]: rooms, traps, loot and the odd polite skeleton.
Die, learn, [bank a coin or two|open a shop in town], and go down again with a slightly longer torch.
{hero} has [a shovel|one candle|bad knees]; {villain} has the bottom floor and [no visitors|all the time in the
  world].
Combine [potions, runes and bad ideas|boots, bombs and blessings] into builds that break the game, as intended.
The merchant {friend} buys anything, even [your name|last words].
A run takes [half an hour|about forty minutes]; "one more" takes the night.
Beyond floor twenty the stair to {other} opens, and [the music stops|the map lies].
Daily runs give every player the same dungeon, [so there are no excuses|and one try].
""")

# ---- Templates of accessories and collectibles: a block for each kind ----

GEAR = parse("""
= controller
noun: Wireless Controller; Wired Controller; Pro Gamepad; Compact Pad
size: 2.4 GHz; 3 m cable; radio dongle; 40-hour battery
features: textured grips; two remappable back buttons; adjustable rumble; a headphone socket; drift-free sticks; a
  turbo button; trigger stops; a replaceable thumbstick set
The {model} pad [sits well in small and large hands alike|weighs only 210 grams] and takes hours of play in its
  stride.
Magnetic sensor sticks [do not drift|stay accurate for years], and triggers have [short or long travel|hair stops].
Two paddles on the back can copy any button, [set without software|in three stored profiles].
Pairs with your {platform} in seconds [and reconnects by itself|by holding the small button on top].
The directional pad is a single floating disc that [retro players|fighting-game fans] will appreciate.
Charge it by cable in [two|three] hours and play for [thirty|forty].
Rumble [is strong, precise|can be dialled down] and quiet.
= headset
noun: Wireless Headset; Stereo Headset; Surround Headset; Chat Headset
size: 40 mm drivers; 50 mm drivers; 24-hour battery; 1.2 m cable
features: memory-foam cushions; a detachable microphone; inline volume and mute; a sidetone dial; folding hinges;
  low-latency wireless; noise-cancelling voice pick-up; breathable fabric ear pads
Hear footsteps [behind you|through walls] before their owner hears you.
The boom microphone [flips up to mute|unclips for travel], and your team will stop asking you to repeat yourself.
Cushions of [cool gel and fabric|memory foam] leave room for glasses through a long evening.
The tuning is [warm rather than boomy|neutral], so music sounds right as well.
Plugs into the {platform} pad or [works over the tiny dongle|any 3.5 mm socket].
A chat mix wheel on the left cup balances [game and voices|friends and explosions].
The band is [spring steel|aluminium], bends flat and has survived our drop test.
= charging dock
forms: home console; virtual-reality headset
noun: Charging Dock; Twin Charging Station; Charge Stand; Magnetic Charger
size: for 2 pads; for 4 pads; 5 V 2 A; with 2 battery packs
features: charge lights for each bay; overcharge protection; a weighted base; contact pins that never bend; a spare
  battery; fast charging; a tidy cable channel
Drop two pads in the {model} and both are full in [under three hours|about two and a half hours].
The lights turn from [red to green|orange to white] when charging is done, and can be switched off at night.
Powered from [the console's own port|any wall plug], with a [1.5|2] metre lead.
A heavy base keeps the dock where you put it, [even with one hand|cats included].
No adapters to clip on: the pad goes in [as it is|with its skin on].
Batteries are protected against heat, overcharging and [short circuits|bent contacts].
= memory card
forms: home console; handheld console
noun: Memory Card; Save Card; High-Speed Memory Card; Flash Card
size: 8 MB; 64 MB; 128 GB; 256 GB; 512 GB; 1 TB
features: write protection; a labelled sleeve; a tested controller chip; read speeds of up to [90|160] MB a second;
  rated for 10,000 insertions; a card for each player; a lifetime of saves
Keeps [hundreds of|all your] saves, screenshots and downloaded games in one thumbnail of plastic.
Formatted for {platform}, so it works [out of the packet|as soon as it clicks in].
Copy saves from an old card with the console's own menu; [nothing is lost|it takes a minute].
Tested for [heat, cold and pocket lint|ten thousand insertions].
Comes with a stiff little case that [fits a key ring|also holds two game cards].
Larger sizes load [noticeably faster|games as quickly as the built-in storage].
= carrying case
forms: handheld console; virtual-reality headset
noun: Carrying Case; Travel Case; Hard Shell Case; Shoulder Bag
size: holds 10 games; holds 24 games; 28 cm; slim
features: a water-resistant shell; an elastic mesh pocket; soft lining; room for the charger; a wrist loop; lockable
  zips; slots for game cards
A hard shell outside and [soft fleece|brushed microfibre] inside keep your {platform} free of dents and dust.
There is room for the [charger, two pads|cable, earbuds] and a stack of games.
Zips run smoothly right round, and the pull tabs [stay quiet|are large enough for cold fingers].
It fits under an aircraft seat and [in most school bags|over the handle of a trolley].
The divider can be moved or [taken out altogether|flipped to make a stand].
Seams are double-stitched; [we have used one for two years|the handle takes twelve kilos].
= racing wheel
forms: home console; home computer
noun: Racing Wheel; Force Feedback Wheel; Wheel and Pedal Set; Compact Racing Wheel
size: 270 degree; 900 degree; 1080 degree; 28 cm rim
features: metal paddle shifters; a two-pedal set; quick-release rim; a clamp for any desk; quiet belt drive;
  adjustable rotation; a stitched rim
Feel kerbs, gravel and [loss of grip|the edge of the tyre] through a [belt-driven|dual-motor] base.
Pedals sit on a heavy plate, with a [progressive brake|stiff brake spring] that rewards a trained foot.
Clamps to tables of up to [45|55] mm, [no tools needed|and to most rigs].
The rim is wrapped in [stitched cloth|perforated leatherette] and carries all {platform} buttons.
Rotation adjusts by itself to the car on screen, [from kart to lorry|from go-kart to rally].
Works with every racing game on {platform} [that supports wheels|and is set up in a minute].
= light gun
forms: home console
noun: Light Gun; Infrared Light Gun; Light Gun Twin Pack; Arcade Blaster
size: single; pair; with sensor bar; 3 m cable
features: a recoil motor; a foot pedal for reloading; works on flat screens; a bright orange tip; calibration by two
  shots; a wired sensor bar
Aim, [squint|breathe out] and pull: old-style gallery shooting on modern flat screens.
Two small sensors sit [above and below the screen|on the frame], and calibration takes two shots.
A recoil motor gives every shot a kick, [which can be switched off|louder than the neighbours like].
The trigger is a micro switch with [a clean break|an audible click].
Buttons for reload and grenade fall [under the thumb|on both sides, for left-handers].
Made in bright plastic so that nobody takes it for [anything but a toy|the real thing].
= storage drive
noun: External Drive; Solid-State Drive; Game Drive; Expansion Drive
size: 500 GB; 1 TB; 2 TB; 4 TB; 5 TB
features: no separate power supply; shock protection; up to [540|1,050] MB a second; a braided cable; quiet cooling;
  pre-formatted for play
Space for [thirty|fifty|over a hundred] games, moved from the console in [minutes|the time it takes to make tea].
The drive takes its power from {platform}, so there is [one cable|nothing else to plug in].
Start games straight from the drive or [park them there|use it for back-ups].
A [rubber bumper|metal shell] shields it from knocks [and small hands|and the odd fall].
Setup is done by the console: [plug in, confirm, done|two prompts and you are ready].
Runs [cool and silent|without a fan], [lying down or upright|hidden behind the screen].
= video cable
forms: home console; home computer
noun: Video Cable; HD Cable; Component Cable; Display Adapter
size: 1.5 m; 2 m; 3 m; 5 m
features: gold-plated plugs; triple shielding; a slim connector; a braided jacket; 4K at 60 frames; audio and video in
  one
A clean picture [without hum or ghosting|with sharp edges], as the console's makers intended.
Shielded three times over, [long enough for a wall-mounted screen|thin enough to hide behind one].
Brings your {platform} to [a modern television|a monitor or a projector].
Plugs are slim and [grip firmly|will not block the port next door].
Carries sound as well, so [one cable does it all|no second lead is needed].
= power adapter
noun: Power Adapter; AC Adapter; Car Charger; Replacement Power Supply
size: 12 V; 100-240 V; 45 W; 2.5 m lead
features: a folding plug; surge protection; works from 100 to 240 volts; an indicator light; a reinforced neck; spare
  fuse
Replaces a lost or [chewed|tired] power supply for {platform}.
Accepts 100 to 240 volts, [so it travels|for trips abroad with a simple plug].
Charges while you play, [without the hot-brick smell|and stays barely warm].
Protection against surges, shorts and [overheating|thunderstorms] is built in.
The neck of the lead is reinforced where others [crack|fray].
= screen protector
forms: handheld console
noun: Screen Protector; Tempered Glass Protector; Matte Screen Film; Screen Protector Twin Pack
size: 2-pack; 3-pack; 9H glass; anti-glare
features: 9H hardness; a dust-removal sticker; an alignment frame; bubble-free glue; anti-glare coating; rounded edges
Glass of [0.3|0.25] mm takes the scratches so the screen does not have to.
The alignment frame makes it [almost impossible to fit crooked|a one-minute job].
Touch works as before, [stylus included|even with cold hands].
Cuts reflections on [sunny trains|bright days] without [dulling colours|the rainbow effect].
Peels off [cleanly|without residue] should you ever want it gone.
= cooling stand
forms: home console
noun: Cooling Stand; Vertical Stand; Fan Stand; Stand with Hub
size: 2 fans; 3 fans; with 4-port hub; for 12 games
features: quiet fans; extra ports; a rack for games; rubber feet; fan speed by temperature; a light bar you can turn
  off
Lifts the {platform} upright, and [two fans|three slow fans] carry the heat away.
Frees half a shelf and holds [a dozen games|both pads] at the side.
Fans start [with the console|when it gets warm] and hum below [26|30] decibels.
Extra ports mean [no more crawling behind the cabinet|pads can charge in front].
Rubber feet keep it [steady|from wandering], even on glass.
= arcade stick
forms: home console; home computer
noun: Arcade Stick; Fight Stick; Leverless Fight Pad; Arcade Joystick
size: 8 buttons; 6 buttons; square gate; leverless
features: standard parts that can be swapped; a metal base plate; a tournament lock; octagonal gate included; cable
  locker; a storage hatch with tools
The feel of the arcade at home: [a crisp lever|buttons with short travel] on a base that does not slide.
Every part is a standard size and [comes out with one screwdriver|can be replaced in minutes].
The lock switch disables menu buttons [in tournaments|when elbows get involved].
Heavy enough for the table, [light enough for the lap|comfortable on the knees].
Input lag was measured at [under two|below one] milliseconds.
= thumb grips
forms: home console; handheld console
noun: Thumb Grips; Thumbstick Caps; Grip Set; Stick Extenders
size: 4 pack; 6 pack; 8 pack; tall and short
features: food-grade silicone; tall and short shapes; a non-slip pattern; stays put when it gets hot; washable caps
Slip them over the sticks for [better aim|a surer grip] and less wear.
[Tall caps for aiming, short ones for moving|Two heights are included].
They stay on in [sweaty matches|long sessions] and come off [for a wash|without tools].
A small thing, but thumbs [notice|are grateful].
= flight stick
forms: home console; home computer; virtual-reality headset
noun: Flight Stick; Stick and Throttle; Flight Yoke; Rudder Pedals
size: with throttle; 12 buttons; twist axis; desk clamp
features: a twist rudder; a detachable throttle; contactless sensors; an eight-way hat; suction feet; left-hand use
Take off with [a throttle in one hand and a stick in the other|proper gear under your hands].
Contactless sensors keep it [accurate for years|free of dead zones].
The spring can be [tightened|swapped] to suit biplanes or [jets|space fighters].
Recognised by {platform} flight games [at once|with ready-made profiles].
Suction feet hold it on [glossy desks|the table], and a clamp mount is ready below.
= dance mat
forms: home console
noun: Dance Mat; Foam Dance Pad; Twin Dance Mat; Folding Dance Mat
size: 81 x 93 cm; padded; pair; 8 arrows
features: a non-slip underside; 2 cm foam; a wipe-clean surface; a folding core; a long cable; start and back corners
[Step up|Kick off your shoes]: eight arrows, sturdy foam and a back that grips the floor.
The foam makes the arrows [easy to feel|kind to knees] and downstairs neighbours.
Works with the rhythm games on {platform}, [party modes included|solo or two by two].
Wipes clean and folds [flat for the cupboard|in three].
Plays best in socks, [as a champion told us|says the leaflet].
= capture box
forms: home console; home computer
noun: Capture Box; Game Capture Card; Streaming Box; Video Recorder
size: 1080p; 4K; 60 fps; with mic mixer
features: lag-free pass-through; a microphone mixer; an hour of instant replay; free editing software; one-touch
  recording
Record or stream from {platform} [with one touch|at sixty frames] while the picture passes through without delay.
The last [hour|ten minutes] is always kept, so that lucky shot is not lost.
Mix in a microphone and [a camera|party chat] on the box itself.
Needs no driver on [recent|most] computers.
Files are plain and [open anywhere|easy to edit].
= keyboard
forms: home console; home computer
noun: Gaming Keyboard; Mechanical Keyboard; One-Hand Keypad; Compact Keyboard
size: 60 percent; full size; 27 keys; linear switches
features: hot-swap switches; per-key lights; double-shot keycaps; a detachable cable; onboard profiles; a wrist rest
Keys with [a light, linear stroke|a soft bump] and a sound that will not wake the house.
Every key can hold a macro; profiles [stay on the board|travel with it].
Switches pull out, so [try another feel|replace one] without solder.
Legends are moulded through and [cannot rub off|stay sharp].
Works with PC and with {platform} games that [allow keyboards|accept one].
""")

MERCH = parse("""
= figure
noun: Action Figure; Collectible Figure; Mini Figure; Poseable Figure
size: 10 cm; 15 cm; 18 cm; 1/12 scale
{who} as seen in {title}, with [fourteen|twenty-two] points of articulation and [two|three] pairs of hands.
Comes with the {relic} and a [clear stand|base in the style of {place}].
Paint is applied by hand, so each [face|cape] is a little different.
Scaled to stand next to [{friend} and {villain}|the other figures in the wave].
The window box can be opened and [closed again without a trace|used as a backdrop].
= statue
noun: Resin Statue; Limited Statue; Bust; Diorama
size: 22 cm; 31 cm; 45 cm; numbered
Cast in heavy resin, {who} looks out over the [cliffs|rooftops] of {place}.
Each is numbered under the base, [one of 900|one of 1,500], with a certificate from {publisher}.
Sculpted with the artists of {studio}, down to the [buckles|chipped {relic}].
A [warm light|switchable LED] behind the base picks out the scene.
Some assembly: [two parts and a peg|the head and the cloak slot into place].
= plush
noun: Plush; Plush Toy; Cuddly Toy; Bean Plush
size: 20 cm; 25 cm; 35 cm; giant
Soft, [huggable|squeezable] and slightly grumpy, just like {who} in {title}.
Embroidered eyes and no small parts, [safe from birth|so it may join the cot].
The [scarf|hat|backpack] comes off, and [hides a tiny {relic}|fits other plushes of the line].
Machine washable at thirty degrees, [adventures included|ears first].
Filled with fibre from recycled bottles.
= poster
noun: Poster; Wall Scroll; Art Print; Framed Print
size: 50 x 70 cm; 61 x 91 cm; A2; 30 x 40 cm
{who} before the skyline of {place}, from the [cover|concept] art of {title}.
Printed on [200|250] gram matte paper with inks that [do not fade|hold their colour].
Ships rolled in a stiff tube, [never folded|with end caps].
Signed in the plate by {writer}.
Frame not included, [hangs well in most shop-bought ones|unless you choose the framed version].
= art book
noun: Art Book; The Art of; Concept Art Book; Sketchbook
size: 144 pages; 192 pages; 256 pages; hardback
From first scribbles of {hero} to the final maps of {place}, [over 400|more than 600] drawings in one hardback.
Artists of {studio} comment on [what was kept and what was cut|every spread].
One chapter is given to {villain}, another to the [fourteen versions|long history] of the {relic}.
Thread-sewn, on heavy paper that [lies flat|smells like a bookshop].
With a foreword by {writer}.
= soundtrack
noun: Soundtrack CD; Vinyl Soundtrack; Original Score; Soundtrack Box Set
size: 2 discs; 1 LP; 3 LPs; 38 tracks
The complete score of {title} by {composer}, [remastered|for the first time in full].
From the [gentle piano of {place}|theme of {hero}] to the thunder that goes with {villain}.
Pressed on [amber|sea-green|marbled] vinyl or disc, in a sleeve with new art.
Liner notes tell how the [choir|hurdy-gurdy|broken organ] got into the recording.
[Thirty-eight|Forty-four] tracks, [five of them never heard in the game|seventy-nine minutes].
= strategy guide
noun: Strategy Guide; Official Guide; Player's Guide; Map Book
size: 208 pages; 288 pages; with fold-out map; pocket size
Maps of {place} and {other}, item tables and [every secret|each hidden door] of {title}.
Tactics for {villain} that [actually work|our staff tried themselves].
A fold-out map and [a spoiler-free first part|interviews with {studio}].
Covers the {platform} version [and its extra chapter|button by button].
Well indexed, so that the {relic} is found in [seconds|two steps].
= keyring
noun: Keyring; Metal Keychain; Charm; Bag Tag
size: 4 cm; 5 cm; zinc; rubber
A little {who} in [zinc|soft rubber] to go with your keys.
Modelled on the {relic}, with [moving parts|an antique finish].
The ring is split steel and [will not open by itself|holds six keys].
[Small|A small] gift for someone who has finished {title} [twice|more than once].
= mug
noun: Mug; Heat-Change Mug; Enamel Mug; Travel Mug
size: 325 ml; 400 ml; 500 ml; two-pack
Pour something hot and {place} lights up [behind {who}|window by window].
Holds [a sensible|a heroic] amount of tea.
[Dishwasher safe|Wash by hand], [not for the microwave|microwave safe].
The crest of {series} inside the rim is [the last thing you see|a nice touch].
= shirt
noun: T-Shirt; Hoodie; Long-Sleeved Shirt; Cap
size: S; M; L; XL
Printed with {who} and the words "{tagline}".
Cotton from [organic farming|a small mill], pre-shrunk and [cut straight|true to size].
The print is soft and [has survived fifty washes|does not crack].
A quiet design: only those who [know {title}|have been to {place}] will nod.
= trading cards
noun: Trading Card Pack; Starter Deck; Booster Box; Card Sleeves
size: 12 cards; 60 cards; 24 packs; 100 sleeves
[Twelve|Ten] cards with art from {title}, one of them [foil|embossed].
Look for the rare {who} with the {relic}, [one in forty packs|found in every other box].
Can be played as a quick duel with the rules [on the wrapper|inside].
Set of [120|180] to collect, from {hero} to the [humblest guard|cats] of {place}.
= pin set
noun: Enamel Pin Set; Pin Badge; Patch Set; Medal
size: set of 3; set of 5; 3 cm; boxed
Hard enamel in [four|six] colours, with {who}, {friend} and the {relic}.
Two posts at the back, so {hero} [stays upright|does not spin].
On a card printed with the map of {place}, [ready to give|good enough to frame].
Metal with [a copper|an antique silver] finish that [ages nicely|feels heavier than it is].
""")

# ---- Templates that all items of a kind share ----

SENTENCES = parse("""
= game in short
{label} for {platform}.
{title} by {studio}.
Ages {age}+.
New and sealed.
See title.
{title}, a {label} from {year}.
{platform} version, {medium} only.
= game openers
{title} is [a|the latest|the much-loved] {label} by {studio} for {platform}.
[Welcome|Return] to {place}, home of {title}.
The {series} series [comes|returns] to {platform} with {title}.
{studio}, the team behind {series}, [presents|is back with] {title}.
[Few|Not many] {label}s are loved like {series}, and {title} [shows|proves] why.
{publisher} brings {title} to {platform}, [complete and uncut|with all the updates so far].
[Looking for|In the mood for] a {label}? {title} [may be the one|is a fine place to start].
"{tagline}." So begins {title}, a {label} for {platform}.
In {title} you play {hero}, a {role} [with something to prove|who wanted none of this|far from home].
When {villain} comes for {place}, only {hero} and {friend} [stand in the way|are there to answer].
[Ten|Five|Seven] years after the events of the first {series}, {hero} goes back to {place}.
This is the {platform} version of {title}, [a {label} from {year}|first released in {year}].
{hero} is back.
What would you give for the {relic}? In {title}, {hero} is about to find out.
It was supposed to be a quiet week in {place}.
Some games ask for an hour; {title} [asks for a winter|gives it back].
{place} needs a {role}, and {hero} [is the only one awake|happens to be passing].
The critics called {title} "[stubborn and brilliant|the warmest {label} in years|a small miracle]".
There are {label}s, and there is {title}.
Pick up [the pad|where you left off] and let {title} show you {place} at its [best|worst].
{villain} made one mistake: underestimating {hero}.
A [bold|fresh|surprising] turn for {series}, made by {studio} in {year}.
Everyone in {other} has heard of {hero}; hardly anyone [would open the door|knows why].
First shown in {year} and [delayed twice|talked about ever since], {title} [was worth the wait|keeps its promises].
Grab a chair, {friend} is about to tell you what [really happened in|became of] {place}.
Your copy of {title} for {platform}, [at a friendly price|shipped today].
Players who grew up with {series} will [feel at home|smile within minutes]; everyone else can start right here.
= game lore
{hero} and {friend} have not spoken since {other}, and now they [need each other|share one map].
The {relic} was [broken|hidden|sold] long ago, and {villain} has found [the first piece|out where].
{place} has its own [songs, festivals and grudges|dialect and a very old bridge], and you will come to know them all.
[Fans|Long-time players] will meet familiar faces, {friend} among them, and [a few old enemies|one unexpected guest].
The script was written by {writer}, who also [wrote the first game|gave {villain} that famous laugh].
No knowledge of the earlier games is needed, though [those who have it|veterans] will catch a wink or two.
What {villain} wants in {other} is [only revealed at the end|nothing like what you think].
{place} is [larger|stranger|more alive] than ever, and {other} can be visited for the first time in the series.
{composer} composed the music, [recorded with a small orchestra|played on instruments built for the game].
Without spoiling too much: keep an eye on {friend}.
Somebody in {place} is [lying|writing letters to {villain}], and it is not the one you suspect.
{friend} is the heart of the story, whether [tied to a chair|asleep] or shouting directions.
A short prologue in {other} [teaches the basics|can be skipped by those in a hurry].
{villain} is voiced with [relish|chilling calm] by {actor}.
Between chapters you return to a [tea house|ferry landing|kitchen table] in {place}, where people talk about you.
Hidden letters tell how {hero} came by the {relic}, [and what it cost|if you care to look].
{studio} spent [three|four|six] years on it, [and visitors to {other} will see where|most of them on the sky].
You will meet a [ferryman|clockmaker|widow] in {other} who is the true author of {villain}'s plans.
Look out for [the talking well|the blue door|a certain goat] in {place}; {studio} never explained it.
{hero} [sings|whistles] when idle, and {friend} [joins in|complains] after a minute.
Rumour has it that {villain} once [lived in {place}|taught {hero} everything].
The {relic} can be worn, pawned or [thrown in the river|given to {friend}], and each has its price.
A festival in {place} fills one [long evening|whole chapter] and is many a player's fondest memory of {series}.
{friend} was [cut from|a minor figure in] an early draft; players at trade fairs would not hear of it.
By the time the snow falls on {other}, [nobody will trust you|you will know what the {relic} is for].
{composer}'s main theme has been [whistled in our shop for months|played at two weddings that we know of].
{actor} lends {hero} a [tired, funny|rough] voice that suits the part.
Two of the team grew up in a town [much like|that looks a lot like] {place}, [bridge included|dogs and all].
The map of {other} was drawn by [hand over a winter|the lead artist's father].
{villain} keeps a [parrot|diary|garden], which turns out to matter.
Every chapter opens with a line from {hero}'s [letters|logbook], and the last one is blank.
Watch for {friend} in [the background|crowds]: there is an award for those who always wave.
There is a second ending for those who [spare {villain}|never touch the {relic}].
The humour is dry, the [sadness|danger] real, and the {role} at the centre of it all [hard to forget|a joy to play].
In {other} you will find a shop that sells [maps of {place}|yesterday's news], and a reason to come back.
Finish it once and {friend} becomes playable[|, with a story of one evening].
It is said that the {relic} can [stop a clock|end a war|make anyone honest], which is why nobody wants it found.
As ever in {series}, the {relic} is not [quite what it seems|the real prize].
"{tagline}" is painted on a wall in {other}, and by the end you will know who wrote it.
= game platform
On {platform} it runs at [a steady sixty frames|a solid frame rate] and [loads in seconds|supports every pad].
This version uses the {platform}'s [rumble|extra buttons|microphone] in [clever|small but welcome] ways.
Needs [a|one] {platform}; [a second pad is recommended|no online account is necessary].
The {medium} holds the full game; [a day-one update is optional|no download is required].
Saves take up about [2|4|9|16] MB on {platform} storage.
Plays on {platform} of every region [sold by this shop|and revision].
The manual is [printed in colour, all forty pages of it|on the {medium}] and comes in [English|six languages].
Subtitles in [seven|nine|eleven] languages, and text that can be made [larger|bolder].
[1-2|1-4|One to eight] players. {maker} rating: ages {age} and over.
Age rating: {age}+. [See the box for details.|May include in-game chat.|No online purchases.]
Suitable for ages {age} and up.
Pushes the {platform} [to its limit|hard], [and the fan will tell you so|without a stutter].
Can be played [without a network connection|offline from start to end].
Three save slots[|, one for each impatient sibling].
The {maker} team helped to bring it to {platform}, [and it shows|with good results].
Text and menus are in English; [voices too|voices are in the language of {place}].
Buttons can be remapped, [subtitles are on from the start|flashes can be toned down].
Achievements of {platform} are [supported|there for those who like them].
= game shop
Sold [sealed|new and sealed] with the original [inlay|sleeve and manual].
Case and artwork are [as new|for this region]; [orders before noon leave the same day|gift wrapping is available].
Our staff pick for [rainy weekends|long train rides|players who say they have no time].
Returned copies are checked by hand and [sold as used|never resold as new].
Please note that [bonus codes may have expired|the outer sleeve can show shelf wear].
If you enjoy it, have a look at the other {series} games and the [art book|soundtrack] in our shop.
Cover art may [differ|vary] from the picture shown.
We have [two|three|a handful] left on the shelf.
Ask us for a copy in [better|lesser] condition if you [collect|only want to play].
Import version: the box is in another language, [the game is not|but the game offers English].
Pre-owned, played once by someone who [was very careful|prefers chess].
Dispatched within [a working day|two working days] in a [padded|cardboard] envelope.
A favourite of [our Saturday staff|the owner's daughter|the shop cat].
Buy it with any other {genre} title and postage is [free|on us].
One of the [ten|five] best-rated {genre} titles we carried [that year|in {year}].
Published by {publisher}, developed by {studio}, released in {year}.
= Deluxe Edition
The Deluxe Edition adds [a season of extra chapters|two costume sets] and {extra}.
Owners of this Deluxe Edition also receive {extra} and [an early unlock|a digital art book].
Deluxe Edition: the game, {extra} and {extra2} in one box.
= Collector's Edition
In the numbered Collector's box: the game, {extra}, {extra2} and [a letter signed by the team|a certificate].
This Collector's Edition was limited to [3,000|5,000|8,000] copies and comes with {extra} as well as {extra2}.
Housed in [a cloth-bound box|a tin shaped like the {relic}], the Collector's Edition holds {extra} and {extra2}.
= Remastered
Remastered from the original {year_before} release, with [redrawn textures|new lighting] and a re-recorded soundtrack.
The original artwork was [scanned again|repainted by hand]; switch between old and new at the press of a button.
This remaster keeps the old game intact and fixes [the camera|what time had not been kind to].
= Complete Edition
Complete Edition: the base game and all [three|four|five] expansions on one {medium}.
With every add-on included, this is [some ninety hours|the definitive form] of {title}.
= Launch Edition
First-print Launch Edition with a reversible cover and {extra}.
Only the Launch Edition came with {extra}; [few are left|we found a sealed box of them].
= gear in short
{noun} for {platform}, {colour}.
{brand} {noun}, {size}.
For {platform}.
New in box.
{colour_cap}. {size}.
= gear openers
The {brand} {model} is [a|our best-selling|a well-made] {noun} for {platform}.
[Made for|Designed around] {platform}: the {brand} {model}.
{brand} [know|knows] {kind}s, and the {model} [shows it|is the one to get].
A {kind} [should just work|is bought once]. The {model} [does|is made that way].
Meet the {model}, [the newest|a small but clever] {kind} from {brand}.
[Tired of|Done with] flimsy accessories? {brand} builds this {kind} [to last|like a tool].
Upgrade your {platform} with this {colour} {kind} by {brand}.
{colour_cap} {noun} by {brand}, {size}.
[Lost the old one?|Need a second one?] This {kind} for {platform} comes from {brand}.
{noun}: {size}, {colour}, [no nonsense|nicely made].
The {model} has been in our range for [three|five] years, [and rarely comes back|with good reason].
For {platform} players who [care about details|use their things every day].
{brand} {model}, the {kind} [the forums agree on|we would buy again].
An affordable {kind} that [does not feel like one|punches above its price].
= gear compat
[Fits|Compatible with] every {platform} model, [slim versions included|including the first revision].
Not compatible with earlier {maker} consoles.
Works with {platform}[| and, by cable, with PC].
Licensed by {maker} and [tested|approved] for {platform}.
This is a third-party product; it is not made by {maker}.
Please check that you own a {platform} [before ordering|and not its predecessor].
= gear for PC
Compatible with any recent PC.
Works with PC [out of the box|without extra software].
= gear box
In the box: {brand} {model} {noun} ({colour}), [a quick guide|a printed manual] and [a cable|a cloth pouch|a sticker].
You get [one|1 x] {noun} in {colour}, {size}, with [a guide|manual] in [five|eight] languages.
Size: {size}. Colour: {colour}.
Backed by a [one|two|three]-year [warranty|guarantee] from {brand}.
Weighs [120|180|240|310|450] g and measures [11|14|17|22] x [6|8|9] x [3|4|5] cm.
Also sold in [{other_colour}|{other_colour} and other colours].
Packed in [recycled card|plain cardboard] without plastic.
Spare parts are available from {brand}, [which we like|a rare thing these days].
{brand} answers e-mails [within a day|in person], should anything go wrong.
Our tester used it for [six weeks|a month] and [gave it back only under protest|found nothing to fault].
Colour on the box: {colour}; [the real thing is a shade darker|true to the photograph].
{size}, {colour}, [model of this year|second revision].
Ships in [a day|two days]; [returns are free for a month|batteries not included where needed].
The {brand} logo is [small and on the back|moulded, not printed].
Assembly: [none|five minutes and a screwdriver].
{brand} asked us to say that [the {colour} one is the prettiest|it is not a toy].
Keep away from water and [children under three|open flames].
= merch in short
Licensed {series} {kind}.
{who}, {size}.
{series} {kind} by {brand}.
New, in original packaging.
= merch openers
Official {series} {kind} [from|by] {publisher}.
A {kind} for [fans|lovers] of {series}, the {genre} series by {studio}.
[Bring home|Take home] a piece of {place}.
{who} [needs no introduction|is everyone's favourite] in {title}.
For [the shelf|the desk|the wall] of anyone who has [lost a weekend to|a soft spot for] {title}.
The {brand} collection continues with [a|this] {series} {kind}.
"{tagline}." Every {series} player [knows the line|remembers].
You have finished {title}. [Now what?|And then?] Perhaps this {kind}.
= merch box
Size: {size}. [Made under licence by {brand}.|Licensed by {publisher}.]
Made by {brand} under licence from {publisher}.
Limited to one per customer [while stocks last|in the first week].
Not a toy: for collectors aged [14|15] and over.
Arrives in a [printed box|plain sleeve] that [makes a good present|is easy to wrap].
The design was approved by {studio}, [hat and all|after three rounds of notes].
Part of a series of [six|eight], sold separately.
Colours may look slightly [warmer|different] than on screen.
{brand} has made {series} goods since {year}, [and it shows|and fans collect them].
Goes well with the {series} [soundtrack|art book|poster], also in our shop.
The game itself is not included.
= console in short
{platform} in {colour}, tested and working.
Console with {pads} and cables.
= console openers
The {platform} is [a|the] {form} by {maker}, first sold in {year}.
{maker}'s {platform} in {colour}, [with all cables|ready to play].
[Start here|Everything you need]: the {platform}, {pads} and [a power supply|all leads].
A {form} [for the whole family|that needs no explaining], in {colour}.
{platform} {noun}: [the same games, a smaller box|what many of us grew up with|new in our shop].
= console facts
Storage: {size}. [Games on {medium}.|Takes {medium} games and downloads.]
It starts up in [nine|twelve] seconds and [sips power|is nearly silent].
Plays the full {platform} library, [some 400|more than 600] titles from {series} to {series2}.
Two players can join [with the pad supplied and a second one|on one machine], four with an adapter.
Connects to any television by [the cable supplied|HD cable], and to the network by [wire or radio|wire].
Parents can set [play time, spending and age limits|a bedtime] from the main menu.
The battery lasts [five to seven|six to nine] hours where the model has one.
Save files move over from an older {platform} in [a few minutes|the settings menu].
{maker} built it with [a quieter fan|fewer screws and a better hinge] than the first model.
Old {maker} accessories [do not fit|need an adapter].
= bundle
The bundle includes {title} on {medium}.
Comes with {title}, the {genre} hit by {studio}[|, and a matching pad].
Printed with {hero} and {villain} of {series}, this model was sold for [one winter|a few months] only.
= console shop
In the box: console, {pads}, power supply, video lead and [a quick guide|manual].
[One|Two]-year guarantee by {maker}.
Refurbished units are cleaned, tested for [two|four] hours and may show [light marks|a scratch or two].
Serial numbers are recorded at dispatch.
Shipped [double-boxed|in plain packaging] and [insured|signed for].
Region free, with a plug for [your country|most of the continent].
= credit in short
Code by e-mail.
{size} code for {platform}.
= credit any
Digital code. Does not expire. Cannot be [returned|exchanged] once shown.
No credit card is needed, which makes it [a safe gift for younger players|an easy present].
Valid only for accounts [in the shop's own country|of the region named on the card].
Enter the [twelve|sixteen] characters in the store menu of your {platform}.
The code is for {platform}; it [cannot be used|does not work] on systems of other makers.
Codes are sent [within minutes|at once], [day and night|weekends too].
= Store Credit
{size} of credit for the {platform} online store, [sent as a code|by e-mail within minutes].
Add it to your {maker} account and buy [games, add-ons and films|whatever you like].
What you do not spend stays in the {maker} account [for good|for later].
= Online Membership
{size} of online play on {platform}, [sent as a code|by e-mail].
Membership brings [online play, cloud saves|two games a month] and [member prices|a birthday badge].
Renews only [if you say so|on request]; several codes add up.
""")
SENTENCES = {name: block["sentences"] for name, block in SENTENCES.items()}

# The parts of a description, and how many sentences each gets beside the others.
SHARES = {
    "game": {"openers": 1.2, "own": 4, "lore": 2, "edition": 2, "platform": 1.2, "shop": 1},
    "gear": {"openers": 1.2, "own": 4, "compat": 1, "box": 2},
    "merch": {"openers": 1.5, "own": 3, "box": 2},
    "console": {"openers": 1.2, "bundle": 1.5, "own": 4, "shop": 2},
    "credit": {"own": 2, "any": 3},
}

# ---- From templates to text ----


def fill(rng: random.Random, template: str, slots: dict[str, str]) -> str:
    """Make the choices of a template, fill its slots, and mend "a" before a vowel and capitals."""
    text = re.sub(r"\[([^\[\]]*)\]", lambda match: rng.choice(match[1].split("|")), template)
    text = text.format_map(slots).format_map(slots)  # a slot may hold another slot
    text = re.sub(r"\b([Tt]he|other|first|Official|[Aa]|[Tt]his) The ", r"\1 ", text)
    text = re.sub(r"\b([Aa]) (?=[aeiouAEIOU8])(?!one\b|uni|use|U[A-Z]|eu)", r"\1n ", text)
    return re.sub(r"(^|[.!?]\"? )([a-z])", lambda match: match[1] + match[2].upper(), text)


def join(rng: random.Random, sentences: list[str]) -> str:
    """Join sentences to paragraphs of three or more."""
    text = sentences[0]
    length = 1
    for sentence in sentences[1:]:
        cut = length >= 3 and rng.random() < 0.3
        text += ("\n" if cut else " ") + sentence
        length = 1 if cut else length + 1
    return text


def describe(rng: random.Random, kind: str, slots: dict[str, str], block: dict, **parts: list[str]) -> str:
    """Write a description of random length: sentences of each part in SHARES, then some features.

    block has the item's own sentences and features. parts are sentences that not all items of this kind share.
    """
    length = min(rng.lognormvariate(4.6, 0.75), 420)  # words
    if length < 22:
        return fill(rng, rng.choice(SENTENCES[f"{kind} in short"]), slots)
    parts["own"] = block["sentences"]
    groups = [(share, parts.get(part) or SENTENCES.get(f"{kind} {part}")) for part, share in SHARES[kind].items()]
    groups = [(share, templates) for share, templates in groups if templates]
    total = sum(share for share, _ in groups)
    sentences, unused = [], []
    for position, (share, templates) in enumerate(groups):
        chance = rng.random()
        # one opening sentence at most
        count = int(length / 15 * share / total + chance) if position > 0 else int(chance < 0.7)
        shuffled = rng.sample(templates, len(templates))
        sentences += [fill(rng, template, slots) for template in shuffled[:count]]
        unused += shuffled[count:]
    if not sentences:
        sentences = [fill(rng, rng.choice(unused), slots)]
    features = block.get("features")
    if not features or length <= 45 or rng.random() >= 0.5:
        return join(rng, sentences)

    chosen = rng.sample(features, min(len(features), 2 + int(length / 45)))
    chosen = [fill(rng, feature, slots) for feature in chosen]
    if len(chosen) > 4:
        heading = rng.choice(["\nFeatures:\n", "\nHighlights:\n", "\n"])
        return join(rng, sentences) + heading + "\n".join(f"- {feature}" for feature in chosen)
    *most, last = [feature[0].lower() + feature[1:] for feature in chosen]
    opening = rng.choice(["With", "Features", "Includes", "Offers", "Expect"])
    sentences.insert(rng.randint(1, len(sentences)), f"{opening} {', '.join(most)} and {last}.")
    return join(rng, sentences)


# ---- A shop ----


@dataclass
class Series:
    """A series of games."""

    name: str
    genre: str
    entries: list[tuple[str, int]]  # title and year of each game
    platforms: list[dict[str, str]]
    slots: dict[str, str]  # names that its texts use
    popularity: float


@dataclass
class Item:
    """A row of the catalogue and its attributes. An attribute that the item lacks is an empty text."""

    kind: str  # game, console, credit, or the kind of accessory or collectible
    category: str
    title: str
    description: str
    platform: str = ""
    genre: str = ""
    series: str = ""
    brand: str = ""
    parent_asin: str = ""
    item_context: str = ""  # the text that is embedded


class Shop:
    """An invented shop: its names are drawn from a seed, each name once."""

    def __init__(self, seed: int):
        self.rng = random.Random(seed)
        self.taken: set[str] = set()
        self.brands = [self.coin("word") + self.rng.choice(BRAND_SUFFIXES) for _ in range(16)]
        self.models = {}  # five brands make each kind of accessory, in two models
        for kind in GEAR:
            for brand in self.rng.sample(self.brands, 5):
                self.models[kind, brand] = self.rng.sample(MODELS, 2)
        self.licensees = [self.coin("word") + suffix for suffix in LICENSEE_SUFFIXES]
        self.publishers = [f"{self.coin('word')} {self.rng.choice(COMPANIES)}" for _ in range(12)]
        self.studios = [f"{self.coin('word')} {self.rng.choice(COMPANIES)}" for _ in range(30)]
        self.platforms = self.make_platforms()
        genres = list(GENRES) * 3
        self.rng.shuffle(genres)
        self.series = [self.make_series(genre) for genre in [*GENRES, *genres][:78]]

    def coin(self, style: str) -> str:
        """Invent a name of a person, a place, or a word for anything else."""
        middles, ends = SYLLABLES[style]
        while True:
            name = self.rng.choice(STARTS) + self.rng.choice(middles) + self.rng.choice(ends)
            real = any(piece in name.lower() for piece in REAL_NAMES)
            if len(name) <= 12 and name not in self.taken and not real:
                self.taken.add(name)
                return name

    def make_platforms(self) -> list[dict[str, str]]:
        """Each platform is the slots that it fills."""
        makers = [f"{self.coin('word')} {suffix}" for suffix in self.rng.sample(FACTORIES, 3)] + ["PC"]
        names = {role: self.coin("word") for role in ("home", "rival", "pocket", "headset")}
        first = self.rng.randint(1996, 2001)
        platforms = []
        for name, maker, form, medium, years in PLATFORMS:
            slots = {"platform": fill(self.rng, name, names), "maker": makers[maker], "form": form}
            platforms.append({**slots, "medium": medium, "year": str(first + years)})
        return platforms

    def make_series(self, genre: str) -> Series:
        rng, block = self.rng, GENRES[genre]
        hero, place, word = self.coin("person"), self.coin("place"), self.coin("word")
        relic = rng.choice(RELICS)
        name = rng.choice(block["names"]).format(p=hero, q=place, w=word, r=relic)
        entries = self.make_entries(name, block["nouns"])
        oldest = rng.randrange(4)
        slots = {
            "series": name,
            "genre": genre,
            "hero": hero,
            "place": place,
            "friend": self.coin("person"),
            "villain": self.coin("person"),
            "other": self.coin("place"),
            "relic": relic,
            "role": rng.choice(block["role"]),
            "age": rng.choice(block["age"]),
            "writer": f"{self.coin('person')} {self.coin('word')}",
            "actor": f"{self.coin('person')} {self.coin('word')}",
            "composer": f"{self.coin('person')} {self.coin('word')}",
            "tagline": rng.choice(TAGLINES),
            "studio": rng.choice(self.studios),
            "publisher": rng.choice(self.publishers),
        }
        platforms = rng.sample(self.platforms[oldest:], rng.randint(2, 4))
        return Series(name, genre, entries, platforms, slots, rng.uniform(0.5, 2))

    def make_entries(self, name: str, nouns: list[str]) -> list[tuple[str, int]]:
        """Invent titles and years of two to five games of a series."""
        rng = self.rng
        year = rng.randint(1997, 2012)
        style = rng.choice(["number", "roman", "subtitle", "mixed"])
        nouns = list(nouns)
        rng.shuffle(nouns)
        count = rng.randint(3, 6) - 1
        first_has_subtitle = rng.random() < 0.3 and style == "subtitle"
        entries = []
        for index in range(count):
            title = name
            if index > 0 and style != "subtitle":
                title += f" {ROMAN[index] if style == 'roman' else index + 1}"
            if first_has_subtitle if index == 0 else style in ("subtitle", "mixed"):
                title += f": {nouns[index]}"
            entries.append((title, year))
            year += rng.randint(1, 4)
        return entries

    def choose_series(self) -> Series:
        return self.rng.choices(self.series, [series.popularity for series in self.series])[0]

    def game(self) -> Item:
        rng, series = self.rng, self.choose_series()
        entry, year = rng.choice(series.entries)
        platform = rng.choice(series.platforms)
        edition = rng.choice(EDITIONS) if rng.random() < 0.35 else ""
        slots = {
            **series.slots,
            **platform,
            "title": entry,
            "year": str(year),
            "year_before": str(year - rng.randint(6, 12)),
            "label": rng.choice(GENRES[series.genre]["label"]),
        }
        slots["extra"], slots["extra2"] = rng.sample(EXTRAS, 2)
        title = rng.choice(["{0} - {1}", "{0} ({1})", "{0} for {1}", "{0} [{1}]"])
        full_name = rng.choice(["{} - {}", "{} {}", "{}: {}"]).format(entry, edition) if edition else entry
        title = title.format(full_name, platform["platform"])
        openers = SENTENCES["game openers"]
        if entry == series.name:  # it is the first game itself
            openers = [line for line in openers if "the first {series}" not in line]
        edition = [rng.choice(SENTENCES[edition])] if edition else []
        text = describe(rng, "game", slots, GENRES[series.genre], openers=openers, edition=edition)
        category, publisher = f"Games > {series.genre.title()}", slots["publisher"]
        return Item("game", category, title, text, platform["platform"], series.genre, series.name, publisher)

    def gear(self) -> Item:
        rng = self.rng
        kind, brand = rng.choice(list(self.models))
        block, model = GEAR[kind], rng.choice(self.models[kind, brand])
        platform = rng.choice([one for one in self.platforms if one["form"] in block.get("forms", FORMS)])
        colour, other_colour = rng.sample(COLOURS, 2)
        slots = {
            **platform,
            "brand": brand,
            "model": model,
            "kind": kind,
            "noun": rng.choice(block["noun"]),
            "size": rng.choice(block["size"]),
            "colour": colour,
            "colour_cap": colour.capitalize(),
            "other_colour": other_colour,
        }
        title = "{brand} {model} {noun} for {platform}[|, {size}|, {colour}| - {colour}, {size}| ({colour})]"
        title = fill(rng, title, slots)
        compat = SENTENCES["gear for PC"] if platform["platform"] == "PC" else []
        text = describe(rng, "gear", slots, block, compat=compat)
        return Item(kind, f"Accessories > {kind.title()}", title, text, platform["platform"], brand=brand)

    def merch(self) -> Item:
        rng, series = self.rng, self.choose_series()
        kind, brand = rng.choice(list(MERCH)), rng.choice(self.licensees)
        entry, year = rng.choice(series.entries)
        slots = {
            **series.slots,
            **rng.choice(series.platforms),
            "title": entry,
            "year": str(year),
            "brand": brand,
            "kind": kind,
            "noun": rng.choice(MERCH[kind]["noun"]),
            "size": rng.choice(MERCH[kind]["size"]),
            "who": series.slots[rng.choice(["hero", "hero", "friend", "villain"])],
        }
        if slots["noun"] == "The Art of":
            title = "The Art of {title}, {size}"
        elif kind in ("soundtrack", "strategy guide", "art book"):
            title = rng.choice(["{title} {noun}", "{title} {noun} ({size})"])
        else:
            title = "{series} {noun} - {who}" + rng.choice(["", ", {size}"])
            title = rng.choice([title, "{brand} " + title, "{who} {noun}, {series} ({size})"])
        title = fill(rng, title, slots)
        text = describe(rng, "merch", slots, MERCH[kind])
        return Item(kind, f"Collectibles > {kind.title()}", title, text, "", series.genre, series.name, brand)

    def console(self) -> Item:
        rng = self.rng
        platform, colour = rng.choice(self.platforms[:-1]), rng.choice(COLOURS)
        series, series2 = rng.sample(self.series, 2)
        entry, _ = rng.choice(series.entries)
        noun = rng.choice(["Console", "Slim Console", "System", "Refurbished Console"])
        bundle = SENTENCES["bundle"] if rng.random() < 0.35 else []
        slots = {
            **series.slots,
            **platform,
            "title": entry,
            "colour": colour,
            "noun": noun,
            "series2": series2.name,
            "size": rng.choice(["32 GB", "500 GB", "1 TB"]),
            "pads": rng.choice(["one pad", "two pads", "a controller"]),
        }
        ending = rng.choice([f"{entry} Bundle", f"{series.name} Edition"]) if bundle else colour.title()
        text = describe(rng, "console", slots, {"sentences": SENTENCES["console facts"]}, bundle=bundle)
        title, name = f"{platform['platform']} {noun} - {ending}", series.name if bundle else ""
        return Item("console", "Consoles", title, text, platform["platform"], "", name, platform["maker"])

    def credit(self) -> Item:
        rng = self.rng
        platform = rng.choice(self.platforms[:-1])
        size = rng.choice(["10 coins", "20 coins", "25 coins", "50 coins", "3 months", "12 months"])
        name = "Store Credit" if "coins" in size else "Online Membership"
        text = describe(rng, "credit", {**platform, "size": size}, {"sentences": SENTENCES[name]})
        title = f"{platform['platform']} {name}, {size}" + rng.choice(["", " [Digital Code]", " - Gift Card"])
        return Item("credit", "Gift Cards", title, text, platform["platform"], brand=platform["maker"])


# ---- The catalogue ----


def item_context(rng: random.Random, item: Item) -> str:
    """Join the attributes of an item. Some are left out at random, as real catalogues have gaps."""
    lines = [f"Title: {item.title}", f"Description: {item.description}"]
    if item.platform and rng.random() < 0.5:
        lines.append(f"Platform: {item.platform}")
    if rng.random() < 0.6:
        lines.append(f"Category: {item.category}")
    if item.brand and rng.random() < 0.3:
        lines.append(f"Brand: {item.brand}")
    return "\n".join(lines)


def make_items(seed: int = 0) -> list[Item]:
    """Make the items of one shop in random order. Titles and descriptions are unique."""
    shop, items, seen = Shop(seed), [], set()
    for kind, quota in QUOTAS.items():
        wanted = len(items) + quota
        while len(items) < wanted:
            item = getattr(shop, kind)()
            if item.title not in seen and item.description not in seen:
                seen |= {item.title, item.description}
                items.append(item)
    shop.rng.shuffle(items)
    for number, item in enumerate(items, start=1):
        item.parent_asin = f"S{number:04d}"
        item.item_context = item_context(shop.rng, item)
    return items


def main() -> None:
    items = make_items()
    columns = ["parent_asin", "title", "item_context"]
    frame = pl.DataFrame({column: [getattr(item, column) for item in items] for column in columns})
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    frame.write_parquet(OUTPUT)
    print(f"{len(frame):,} items, {OUTPUT.stat().st_size / 1e6:.2f} MB: {OUTPUT}")


if __name__ == "__main__":
    main()
